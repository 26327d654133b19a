/* A pass of a few tokens through a whole decoder in one call: the list of operations of step.h, one after the other. */
#include "additive.h"
#include "dense.h"
#include "linear.h"
#include "step_attention.h"
#include "step_values.h"

/* What a pass works with: the arena, and what a linear layer's tokens were coded to, which layers behind it may take over. */
typedef struct {
    const Program *program;
    const Call *call;
    int64_t tokens;
    float *arena, *seen;
    const float *forced;
    Linear coded;
    float *tables;
    size_t table_floats;
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

/* data: plan, packed, scale, zero, column sums, bias; a: whether the layer before has coded the same input in the same way. */
static int32_t run_linear(Pass *pass, const Op *op) {
    const View *in = view_of(pass, op->in), *out = view_of(pass, op->out);
    const float *x = at(pass, in, 0, 0);
    float *y = at(pass, out, 0, 0);
    const Linear before = pass->coded;
    Linear *layer = &pass->coded;
    *layer = (Linear){read_plan(op->data[0]), op->data[1], op->data[3], op->data[2], op->data[5], op->data[4], pass->tokens, before.spikes, before.thresholds, before.totals};
    const Header *head = &layer->plan.head;
    show(pass, x, head->in);
    if (!op->a) {
        free(before.spikes);
        free(before.thresholds);
        free(before.totals);
        layer->spikes = calloc((size_t)pass->tokens, (size_t)head->buffer + 1);
        layer->thresholds = malloc(sizeof(Threshold) * (size_t)pass->tokens * (size_t)(head->groups + 1));
        layer->totals = malloc(sizeof(int32_t) * (size_t)pass->tokens * (size_t)(head->segments + 1));
    }
    const size_t floats = 2 * ((size_t)head->in + 1), strip = STRIP * (size_t)pass->tokens, bytes = (size_t)head->in + 1;
    float *room = malloc(sizeof(float) * (floats + strip) + bytes + STRIP * (size_t)stride_of(&layer->plan));
    const int ready = room && layer->spikes && layer->thresholds && layer->totals;
    if (ready) {
        uint8_t *codes = (uint8_t *)(room + floats + strip);
        for (int64_t n = 0; !op->a && n < pass->tokens; n++) code_token(layer, x, FLOAT32, n, room, codes);
        for (int64_t s = 0; s < strips_of(head); s++) run_strip(layer, s, (int8_t *)(codes + bytes), room + floats, y, FLOAT32);
        round_to_type(y, pass->tokens * head->out, pass->program->type);
        show_output(pass, y, head->out);
    }
    free(room);
    return !ready;
}

/* data: plan, words, scale, bias; a: whether the layer before has the same tables. */
static int32_t run_additive(Pass *pass, const Op *op) {
    const Additive layer = read_additive(op->data[0], op->data[1], op->data[2], op->data[3]);
    const float *x = at(pass, view_of(pass, op->in), 0, 0);
    float *y = at(pass, view_of(pass, op->out), 0, 0);
    const int32_t in = layer.head->in, out = layer.head->out;
    const size_t size = table_size(&layer) + ENTRIES;
    show(pass, x, in);
    if (pass->table_floats < size * (size_t)pass->tokens) {
        free(pass->tables);
        pass->table_floats = size * (size_t)pass->tokens;
        pass->tables = aligned_alloc(64, sizeof(float) * pass->table_floats);
        if (!pass->tables) return 1;
    }
    for (int64_t n = 0; !op->a && n < pass->tokens; n++) fill_tables(&layer, x + n * in, pass->tables + n * (int64_t)size);
    for (int32_t block = 0; block < blocks_of(&layer); block++)
        for (int64_t n = 0; n < pass->tokens; n++) run_block(&layer, block, pass->tables + n * (int64_t)size, y, FLOAT32, n * out);
    round_to_type(y, pass->tokens * out, pass->program->type);
    show_output(pass, y, out);
    return 0;
}

/* data: weight, (out, in), of type a, bias. */
static int32_t run_dense(Pass *pass, const Op *op) {
    const View *in = view_of(pass, op->in), *out = view_of(pass, op->out);
    const float *x = at(pass, in, 0, 0), *bias = op->data[1];
    float *y = at(pass, out, 0, 0), *ordered = malloc(sizeof(float) * (size_t)(pass->tokens * in->size) + 1);
    if (!ordered) return 1;
    show(pass, x, in->size);
    for (int64_t n = 0; n < pass->tokens; n++) order_inputs(x + n * in->size, in->size, op->a, ordered + n * in->size);
    for (int64_t o = 0; o < out->size; o += DENSE_ROWS)
        for (int64_t n = 0; n < pass->tokens; n++) {
            const int64_t some = out->size - o < DENSE_ROWS ? out->size - o : DENSE_ROWS;
            float sums[DENSE_ROWS];
            dense_sums(ordered + n * in->size, op->data[0], op->a, in->size, o, some, sums);
            for (int64_t r = 0; r < some; r++) y[n * out->size + o + r] = sums[r] + (bias ? bias[o + r] : 0.0f);
        }
    round_to_type(y, pass->tokens * out->size, pass->program->type);
    show_output(pass, y, out->size);
    free(ordered);
    return 0;
}

/* a: layer; data: Attention; in, other: queries and keys. */
static int32_t run_attention(Pass *pass, const Op *op) {
    const Attention *own = op->data[0];
    const Attending task = {own, pass->call, pass->program, pass->call->cached[own->layer], pass->arena, *view_of(pass, op->in), *view_of(pass, op->other), *view_of(pass, own->value),
                            *view_of(pass, op->out)};
    int32_t failed = 0;
    for (int64_t n = 0; n < pass->call->batch * own->kv_heads; n++) {
        const int64_t sequence = n / own->kv_heads, head = n % own->kv_heads;
        failed |= !(own->key_plan ? attend_to_spikes(&task, sequence, head) : attend_to_numbers(&task, sequence, head));
    }
    return failed;
}

/* Operations on one token and head at a time. */
static void run_values(Pass *pass, const Op *op) {
    const int32_t type = pass->program->type, tanhs = pass->program->lanes;
    const View *in = view_of(pass, op->in), *out = view_of(pass, op->out), *other = op->other < 0 ? NULL : view_of(pass, op->other);
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
            default: activate_row(op, x, other ? at(pass, other, n, h) : NULL, in->size, n, pass->tokens, type, tanhs, y);
            }
        }
}

static int32_t run(Pass *pass, const Op *op) {
    switch (op->kind) {
    case LINEAR: return run_linear(pass, op);
    case ADDITIVE: return run_additive(pass, op);
    case DENSE: return run_dense(pass, op);
    case ATTEND: return run_attention(pass, op);
    default: run_values(pass, op); return 0;
    }
}

/* New tokens count as held, all at once: nobody ever sees a cache that only some layers have written to. */
static void hold_new_tokens(const Program *program, const Call *call) {
    for (int64_t i = 0; i < program->count; i++) {
        if (program->ops[i].kind != ATTEND) continue;
        Cached *cached = call->cached[((const Attention *)program->ops[i].data[0])->layer];
        cached->past += call->queries;
        cached->total += call->queries;
        if (cached->keep && cached->past > cached->keep) {
            cached->first += cached->past - cached->keep;
            cached->past = cached->keep;
        }
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
    free(pass.coded.spikes);
    free(pass.coded.thresholds);
    free(pass.coded.totals);
    free(pass.tables);
    free(pass.arena);
    return failed;
}
