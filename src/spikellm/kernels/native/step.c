/* A pass of a few tokens through a whole decoder in one call: the list of operations of step.h, one after the other. */
#include "additive.h"
#include "dense.h"
#include "linear.h"
#include "step_attention.h"
#include "step_values.h"
#include "team.h"
#include "weight_products.h"

#define WORTH 32768 /* bytes of weights that are worth a thread */

/* Memory that is used again, at multiples of 64 bytes. */
typedef struct { void *memory; size_t size; } Room;

static int room_for(Room *room, size_t size) {
    if (room->size >= size && room->memory) return 1;
    free(room->memory);
    room->size = (size + 63) / 64 * 64 + 64;
    room->memory = aligned_alloc(64, room->size);
    return room->memory != NULL;
}

/* What a pass works with: the arena, and what a linear layer's tokens were coded to, which layers behind it may take over. */
typedef struct {
    const Program *program;
    const Call *call;
    int64_t tokens;
    float *arena, *seen;
    const float *forced;
    Linear coded;
    Room codes, tables;
} Pass;

static float *at(const Pass *pass, const View *view, int64_t token, int64_t head) {
    return pass->arena + pass->tokens * view->at + token * view->stride + view->first + head * view->apart;
}

static const View *view_of(const Pass *pass, int32_t index) { return pass->program->views + index; }

/* What a layer is fed goes where somebody looks at it. */
static void show(Pass *pass, const float *x, int64_t columns) {
    if (!pass->seen) return;
    memcpy(pass->seen, x, sizeof(float) * (size_t)(pass->tokens * columns));
    pass->seen += pass->tokens * columns;
}

/* What it gives, too, in whose place comes what the pass goes on with. */
static void show_output(Pass *pass, float *y, int64_t columns) {
    show(pass, y, columns);
    if (!pass->forced) return;
    memcpy(y, pass->forced, sizeof(float) * (size_t)(pass->tokens * columns));
    pass->forced += pass->tokens * columns;
}

/* Threads for work that reads so many bytes: a part of less is done before another thread has begun. */
static int32_t threads_for(const Pass *pass, int64_t bytes) {
    const int64_t most = bytes / WORTH;
    return (int32_t)(most < pass->call->threads ? most : pass->call->threads);
}

/* Room of one thread for strips, and their outputs. */
typedef struct { const Linear *layer; float *y; } Strips;

static int32_t run_strips(void *work, int64_t first, int64_t last) {
    const Strips *own = work;
    const size_t floats = STRIP * (size_t)own->layer->tokens;
    float *room = malloc(sizeof(float) * floats + unpacked_bytes(own->layer));
    for (int64_t strip = first; room && strip < last; strip++) run_strip(own->layer, strip, (int8_t *)(room + floats), room, own->y, FLOAT32);
    free(room);
    return !room;
}

typedef struct { const Linear *layer; const float *x; } Coding;

static int32_t code_tokens(void *work, int64_t first, int64_t last) {
    const Coding *own = work;
    const int64_t in = own->layer->plan.head.in;
    float *room = malloc(sizeof(float) * 2 * (size_t)(in + 1) + (size_t)in + 1);
    for (int64_t n = first; room && n < last; n++) place_token(own->layer, own->x, FLOAT32, n, room, (uint8_t *)(room + 2 * (in + 1)));
    free(room);
    return !room;
}

/* data: plan, packed, scale, zero, column sums, bias; a: whether the layer before has coded the same input in the same way. */
static int32_t run_linear(Pass *pass, const Op *op) {
    const float *x = at(pass, view_of(pass, op->in), 0, 0);
    float *y = at(pass, view_of(pass, op->out), 0, 0);
    Linear *layer = &pass->coded;
    layer->plan = read_plan(op->data[0]);
    layer->packed = op->data[1], layer->scale = op->data[2], layer->zero = op->data[3], layer->column_sums = op->data[4], layer->bias = op->data[5];
    const Header *head = &layer->plan.head;
    const int64_t tokens = layer->tokens = pass->tokens;
    show(pass, x, head->in);
    if (!op->a) {
        if (!room_for(&pass->codes, coded_bytes(head, tokens))) return 1;
        code_to(layer, pass->codes.memory, 0);
        Coding coding = {layer, x};
        if (share_work(code_tokens, &coding, tokens, threads_for(pass, tokens * head->in * 16))) return 1;
    }
    Strips strips = {layer, y};
    if (share_work(run_strips, &strips, strips_of(head), threads_for(pass, (int64_t)head->out * head->row_bytes * tokens))) return 1;
    round_to_type(y, tokens * head->out, pass->program->type);
    show_output(pass, y, head->out);
    return 0;
}

typedef struct { const Additive *layer; const float *tables; float *y; int64_t tokens, apart; } Blocks;

static int32_t run_blocks(void *work, int64_t first, int64_t last) {
    const Blocks *own = work;
    for (int64_t block = first; block < last; block++)
        for (int64_t n = 0; n < own->tokens; n++) run_block(own->layer, (int32_t)block, own->tables + n * own->apart, own->y, FLOAT32, n * own->layer->head->out);
    return 0;
}

/* data: plan, words, scale, bias; a: whether the layer before has the same tables. */
static int32_t run_additive(Pass *pass, const Op *op) {
    const Additive layer = read_additive(op->data[0], op->data[1], op->data[2], op->data[3]);
    const float *x = at(pass, view_of(pass, op->in), 0, 0);
    float *y = at(pass, view_of(pass, op->out), 0, 0);
    const int64_t in = layer.head->in, out = layer.head->out, size = (int64_t)table_size(&layer) + ENTRIES;
    show(pass, x, in);
    if (!room_for(&pass->tables, sizeof(float) * (size_t)(size * pass->tokens))) return 1;
    float *tables = pass->tables.memory;
    for (int64_t n = 0; !op->a && n < pass->tokens; n++) fill_tables(&layer, x + n * in, tables + n * size);
    Blocks blocks = {&layer, tables, y, pass->tokens, size};
    share_work(run_blocks, &blocks, blocks_of(&layer), threads_for(pass, (int64_t)layer.head->words * out * 4 * pass->tokens));
    round_to_type(y, pass->tokens * out, pass->program->type);
    show_output(pass, y, out);
    return 0;
}

typedef struct { const float *x, *bias; const void *weights; float *y; int64_t tokens, in, out; int32_t type; } Dense;

static int32_t run_rows(void *work, int64_t first, int64_t last) {
    const Dense *own = work;
    for (int64_t o = first * DENSE_ROWS; o < last * DENSE_ROWS && o < own->out; o += DENSE_ROWS)
        for (int64_t n = 0; n < own->tokens; n++) {
            const int64_t some = own->out - o < DENSE_ROWS ? own->out - o : DENSE_ROWS;
            float sums[DENSE_ROWS];
            dense_sums(own->x + n * own->in, own->weights, own->type, own->in, o, some, sums);
            for (int64_t r = 0; r < some; r++) own->y[n * own->out + o + r] = sums[r] + (own->bias ? own->bias[o + r] : 0.0f);
        }
    return 0;
}

/* data: weight, (out, in), of type a, bias. */
static int32_t run_dense(Pass *pass, const Op *op) {
    const View *in = view_of(pass, op->in), *out = view_of(pass, op->out);
    const float *x = at(pass, in, 0, 0);
    float *y = at(pass, out, 0, 0);
    show(pass, x, in->size);
    if (!room_for(&pass->codes, sizeof(float) * (size_t)(pass->tokens * in->size))) return 1;
    float *ordered = pass->codes.memory;
    for (int64_t n = 0; n < pass->tokens; n++) order_inputs(x + n * in->size, in->size, op->a, ordered + n * in->size);
    Dense dense = {ordered, op->data[1], op->data[0], y, pass->tokens, in->size, out->size, op->a};
    share_work(run_rows, &dense, (out->size + DENSE_ROWS - 1) / DENSE_ROWS, threads_for(pass, (int64_t)in->size * out->size * 2));
    round_to_type(y, pass->tokens * out->size, pass->program->type);
    show_output(pass, y, out->size);
    return 0;
}

/* data: plan, packed, scale, zero, bias. */
static int32_t run_weight_only(Pass *pass, const Op *op) {
    const float *x = at(pass, view_of(pass, op->in), 0, 0);
    float *y = at(pass, view_of(pass, op->out), 0, 0);
    const WeightSizes size = weight_sizes(op->data[0]);
    show(pass, x, size.in);
    const size_t bytes = sizeof(float) * (size_t)(pass->tokens * size.buffer);
    if (!room_for(&pass->codes, bytes)) return 1;
    float *placed = memset(pass->codes.memory, 0, bytes);
    for (int64_t n = 0; n < pass->tokens; n++) place_weight_inputs(op->data[0], x + n * size.in, placed + n * size.buffer);
    WeightOnly layer = {op->data[0], op->data[1], op->data[3], op->data[2], op->data[4], placed, y, pass->tokens, FLOAT32};
    share_work(run_weight_strips, &layer, size.strips, threads_for(pass, size.out * size.row_bytes * pass->tokens));
    round_to_type(y, pass->tokens * size.out, pass->program->type);
    show_output(pass, y, size.out);
    return 0;
}

static int32_t run_heads(void *work, int64_t first, int64_t last) {
    const Attending *task = work;
    int32_t failed = 0;
    for (int64_t n = first; n < last; n++) {
        const int64_t sequence = n / task->own->kv_heads, head = n % task->own->kv_heads;
        failed |= !(task->own->key_plan ? attend_to_spikes(task, sequence, head) : attend_to_numbers(task, sequence, head));
    }
    return failed;
}

/* a: layer; data: Attention; in, other: queries and keys. */
static int32_t run_attention(Pass *pass, const Op *op) {
    const Attention *own = op->data[0];
    Attending task = {own, pass->call, pass->program, pass->arena, *view_of(pass, op->in), *view_of(pass, op->other), *view_of(pass, own->value),
                      *view_of(pass, op->out)};
    int64_t read = 0;
    for (int64_t s = 0; s < pass->call->batch; s++) read += pass->call->queries * own->heads * (cache_of(pass->call, own->layer, s)->past + 1) * own->key_size;
    return share_work(run_heads, &task, pass->call->batch * own->kv_heads, threads_for(pass, read));
}

/* Operations on one token and head at a time. */
static void run_values(Pass *pass, const Op *op) {
    const int32_t type = pass->program->type, tanhs = pass->program->lanes;
    const View *in = view_of(pass, op->in), *out = view_of(pass, op->out), *other = op->other < 0 ? NULL : view_of(pass, op->other);
    const int64_t together = pass->call->apart ? pass->call->queries : pass->tokens; /* tokens that the model library has in one tensor */
    for (int64_t n = 0; n < pass->tokens; n++)
        for (int32_t h = 0; h < in->heads; h++) {
            const float *x = at(pass, in, n, h);
            float *y = at(pass, out, n, h);
            const int64_t position = pass->call->positions ? pass->call->positions[n] : 0;
            switch (op->kind) {
            case NORM: norm_row(op, x, in->size, type, y); break;
            case ROTATE: rotate_row(op, x, in->size, type, y); break;
            case ROPE: rope_row(x, pass->call->cos[op->a] + position * op->b, pass->call->sin[op->a] + position * op->b, op->b, type, y); break;
            case SCALE: scale_row(x, in->size, op->x, type, y); break;
            case ADD: add_rows(x, at(pass, other, n, h), in->size, type, y); break;
            default: activate_row(op, x, other ? at(pass, other, n, h) : NULL, in->size, n % together, together, type, tanhs, y);
            }
        }
}

static int32_t run(Pass *pass, const Op *op) {
    switch (op->kind) {
    case LINEAR: return run_linear(pass, op);
    case ADDITIVE: return run_additive(pass, op);
    case DENSE: return run_dense(pass, op);
    case WEIGHT_ONLY: return run_weight_only(pass, op);
    case ATTEND: return run_attention(pass, op);
    default: run_values(pass, op); return 0;
    }
}

/* Operations first to last. Returns 0, or 1 where memory ran out. Rows of new tokens are written behind those that the cache holds; they count as held only after the last
   operation of the list. */
int32_t spikellm_step(const Program *program, const Call *call) {
    Pass pass = {.program = program, .call = call, .tokens = call->batch * call->queries, .seen = call->seen, .forced = call->forced};
    pass.arena = malloc(sizeof(float) * (size_t)(pass.tokens * program->floats));
    int32_t failed = !pass.arena;
    const View *input = program->views, *output = program->views + call->result;
    if (!failed) memcpy(at(&pass, input, 0, 0), call->input, sizeof(float) * (size_t)(pass.tokens * input->size));
    for (int64_t i = call->first; !failed && i < call->last; i++) failed = run(&pass, program->ops + i);
    if (!failed && call->last == program->count && call->commit) hold_new_tokens(program, call);
    for (int64_t n = 0; !failed && call->output && n < pass.tokens; n++) store_row(call->output, program->type, n * output->size, at(&pass, output, n, 0), output->size);
    free(pass.codes.memory);
    free(pass.tables.memory);
    free(pass.arena);
    return failed;
}
