/* Attention of one layer over its cache: a head of keys and values of one sequence, and the heads of queries that share it, at a time. */
#ifndef SPIKELLM_STEP_ATTENTION_H
#define SPIKELLM_STEP_ATTENTION_H
#include "mix.h"
#include "numbers.h"
#include "rows.h"
#include "step.h"

/* What the tasks of one layer share. */
typedef struct {
    const Attention *own;
    const Call *call;
    const Program *program;
    float *arena;
    View query, key, value, out;
} Attending;

static inline float *place_of(const Attending *task, const View *view, int64_t token, int64_t head) {
    const int64_t tokens = task->call->batch * task->call->queries;
    return task->arena + tokens * view->at + token * view->stride + view->first + head * view->apart;
}

/* Where a layer's rows of a sequence are held: in a cache of its own, or as one of several in the only one. */
static inline Cached *cache_of(const Call *call, int64_t layer, int64_t sequence) { return call->cached[sequence * call->apart + layer]; }

static inline int64_t row_of_cache(const Attending *task, int64_t sequence, int64_t head) { return (task->call->apart ? 0 : sequence) * task->own->kv_heads + head; }

static inline void round_to_type(float *x, int64_t count, int32_t type) {
    if (type == FLOAT32) return;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
        memcpy(x + i, &bits, sizeof bits);
    }
}

/* Channels through the map of their head, entries (3, size / 2), and rotated among each other. */
static inline void turn(const Attention *own, const float *map, float *x, int32_t size, float *room) {
    const int32_t half = size / 2;
    if (own->balanced) {
        for (int32_t i = 0; i < half; i++) {
            const float left = x[i], right = x[half + i];
            room[i] = left * map[i] + right * map[half + i];
            room[half + i] = left * map[half + i] + right * map[2 * half + i];
        }
        memcpy(x, room, sizeof(float) * 2 * (size_t)half);
    }
    if (own->rotated) mix_row(x, size, own->signs);
}

static inline int is_seen(const Attending *task, int64_t sequence, int64_t query, int64_t token) {
    const Call *call = task->call;
    const int64_t past = cache_of(call, task->own->layer, sequence)->past, window = task->own->window, at = past + query;
    if (token > at || (window && token <= at - window)) return 0;
    return !call->mask || call->mask[sequence * call->mask_tokens + call->mask_tokens - (past + call->queries) + token] != 0;
}

/* Scores of a query become probabilities, in place. */
static inline void weigh(const Attending *task, int64_t sequence, int64_t query, int64_t tokens, float added, float *scores) {
    const Attention *own = task->own;
    for (int64_t t = 0; t < tokens; t++) {
        float score = (scores[t] + added) * own->scaling;
        if (own->softcap > 0.0f) score = tanhf(score / own->softcap) * own->softcap;
        scores[t] = score;
    }
    if (task->call->mask || own->window || task->call->queries > 1)
        for (int64_t t = 0; t < tokens; t++) scores[t] = is_seen(task, sequence, query, t) ? scores[t] : HIDDEN;
    softmax_of(scores, tokens, task->program->lanes);
}

/* Rows of spikes. Returns 0 where memory ran out. */
static inline int attend_to_spikes(const Attending *task, int64_t sequence, int64_t head) {
    const Attention *own = task->own;
    const Call *call = task->call;
    const Cached *cached = cache_of(call, own->layer, sequence);
    const HeadPlan key = read_head_plan(own->key_plan, head), value = read_head_plan(own->value_plan, head);
    const int64_t queries = call->queries, shared = own->heads / own->kv_heads, rows = shared * queries, tokens = cached->past + queries;
    const int32_t size = own->key_size, most = size > own->value_size ? size : own->value_size;
    uint8_t *keys = (uint8_t *)(uintptr_t)cached->keys + row_of_cache(task, sequence, head) * cached->key_head + cached->first * key.head.row_bytes;
    uint8_t *values = (uint8_t *)(uintptr_t)cached->values + row_of_cache(task, sequence, head) * cached->value_head + cached->first * value.head.row_bytes;
    float *room = malloc(sizeof(float) * (size_t)(4 * (int64_t)(most + 1) + rows * (most + tokens)));
    if (!room) return 0;
    float *x = room + 3 * (most + 1), *wanted = x + most + 1, *scores = wanted + rows * most;
    for (int64_t i = 0; i < queries; i++) {
        const int64_t token = sequence * queries + i, at = cached->past + i;
        memcpy(x, place_of(task, &task->key, token, head), sizeof(float) * (size_t)size);
        for (int32_t c = 0; own->centered && c < size; c++) x[c] -= own->mean[head * size + c];
        turn(own, own->key_map + head * 3 * (size / 2), x, size, room);
        code_head(&key, x, room, room + most + 1, keys + at * key.head.row_bytes, NULL);
        code_head(&value, place_of(task, &task->value, token, head), room, room + most + 1, values + at * value.head.row_bytes, NULL);
    }
    for (int64_t q = 0; q < rows; q++) {
        float *query = wanted + q * size;
        memcpy(query, place_of(task, &task->query, sequence * queries + q % queries, head * shared + q / queries), sizeof(float) * (size_t)size);
        turn(own, own->query_map + head * 3 * (size / 2), query, size, room);
        if (own->query_plan) {
            const HeadPlan plan = read_head_plan(own->query_plan, 0);
            code_head(&plan, query, room, room + most + 1, NULL, query);
        }
    }
    Work work, sums;
    const int ready = start_work(&key, rows, &work);
    if (ready) scores_of_head(&key, wanted, rows, keys, tokens, &work, scores);
    end_work(&work);
    for (int64_t q = 0; ready && q < rows; q++) {
        float added = 0.0f;
        if (own->center && own->softcap > 0.0f) {
            for (int32_t c = 0; c < size; c++) x[c] = wanted[q * size + c] * own->center[head * size + c];
            added = sum_of_row(x, size);
        }
        weigh(task, sequence, q % queries, tokens, added, scores + q * tokens);
    }
    const int done = ready && start_work(&value, rows, &sums);
    if (done) sums_of_head(&value, scores, rows, values, tokens, &sums, wanted);
    if (ready) end_work(&sums);
    for (int64_t q = 0; done && q < rows; q++) {
        float *out = place_of(task, &task->out, sequence * queries + q % queries, head * shared + q / queries);
        memcpy(out, wanted + q * own->value_size, sizeof(float) * (size_t)own->value_size);
        round_to_type(out, own->value_size, task->program->type);
    }
    free(room);
    return done;
}

/* Rows of numbers of the model's type. Returns 0 where memory ran out. */
static inline int attend_to_numbers(const Attending *task, int64_t sequence, int64_t head) {
    const Attention *own = task->own;
    const Call *call = task->call;
    const Cached *cached = cache_of(call, own->layer, sequence);
    const int32_t type = task->program->type, bytes = type == FLOAT32 ? 4 : 2, size = own->key_size, wide = own->value_size;
    const int64_t queries = call->queries, shared = own->heads / own->kv_heads, rows = shared * queries, tokens = cached->past + queries;
    char *keys = (char *)(uintptr_t)cached->keys + row_of_cache(task, sequence, head) * cached->key_head + cached->first * size * bytes;
    char *values = (char *)(uintptr_t)cached->values + row_of_cache(task, sequence, head) * cached->value_head + cached->first * wide * bytes;
    const int all = !call->mask && !own->window && queries == 1;
    float *query = malloc(sizeof(float) * (size_t)(rows * (size + wide)) + (all ? 0 : (size_t)(queries * tokens)));
    if (!query) return 0;
    float *out = query + rows * size;
    uint8_t *seen = all ? NULL : (uint8_t *)(out + rows * wide);
    for (int64_t i = 0; i < queries; i++) {
        const int64_t token = sequence * queries + i, at = cached->past + i;
        store_row(keys, type, at * size, place_of(task, &task->key, token, head), size);
        store_row(values, type, at * wide, place_of(task, &task->value, token, head), wide);
        for (int64_t t = 0; seen && t < tokens; t++) seen[i * tokens + t] = (uint8_t)is_seen(task, sequence, i, t);
    }
    for (int64_t r = 0; r < rows; r++)
        memcpy(query + r * size, place_of(task, &task->query, sequence * queries + r % queries, head * shared + r / queries), sizeof(float) * (size_t)size);
    const Numbers numbers = {tokens, size, wide, type, task->program->lanes, own->scaling, own->softcap};
    const int done = attend_to_rows(&numbers, query, rows, queries, keys, values, seen, out);
    for (int64_t r = 0; done && r < rows; r++) {
        float *to = place_of(task, &task->out, sequence * queries + r % queries, head * shared + r / queries);
        memcpy(to, out + r * wide, sizeof(float) * (size_t)wide);
        round_to_type(to, wide, type);
    }
    free(query);
    return done;
}

/* New tokens count as held, all at once: nobody ever sees a cache that only some layers have written to. */
static inline void hold_new_tokens(const Program *program, const Call *call) {
    for (int64_t i = 0; i < program->count; i++) {
        if (program->ops[i].kind != ATTEND) continue;
        const int64_t layer = ((const Attention *)program->ops[i].data[0])->layer;
        for (int64_t sequence = 0; sequence < (call->apart ? call->batch : 1); sequence++) {
            Cached *cached = cache_of(call, layer, sequence);
            cached->past += call->queries;
            cached->total += call->queries;
            if (cached->keep && cached->past > cached->keep) {
                cached->first += cached->past - cached->keep;
                cached->past = cached->keep;
            }
        }
    }
}
#endif
