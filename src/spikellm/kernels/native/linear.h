/* A spiking linear layer in two parts that any schedule may call: coding of tokens, and sums of a strip of rows for all tokens.

   y[n, o] = Σ_segments (Σ_c q[n, c]·(code[o, c] − zero[o]) − z[n]·Σ_c (code[o, c] − zero[o])) · θ[n] · scale[o]   (+ bias[o]), segments in order, float32 without contraction */
#ifndef SPIKELLM_LINEAR_H
#define SPIKELLM_LINEAR_H
#include "dot.h"
#include "encode.h"
#include "floats.h"

#define STRIP 32 /* rows of weights that are unpacked at a time: with their columns they fit into a second-level cache */

/* A layer, its tensors, and what its tokens were coded to.

   packed: (out, row_bytes); scale, zero: (out, scales); column_sums: (segments, out), Σ (code − zero); bias: (out) or null; spikes: (tokens, buffer), zero where no column
   stands; thresholds: (tokens, groups); totals: (tokens, segments). */
typedef struct {
    Plan plan;
    const uint8_t *packed, *zero;
    const float *scale, *bias;
    const int32_t *column_sums;
    int64_t tokens;
    uint8_t *spikes;
    Threshold *thresholds;
    int32_t *totals;
} Linear;

/* What rows of weights share in one segment and token. */
typedef struct { const int32_t *column_sums; const float *scale; const uint8_t *zero; float theta; int64_t baseline, total, lifted; } Ending;

static inline Ending ending_of(const Linear *layer, int64_t token, int32_t segment) {
    const Plan *plan = &layer->plan;
    const Segment *part = &plan->segments[segment];
    const Threshold *threshold = layer->thresholds + token * plan->head.groups + part->group;
    const int64_t total = layer->totals[token * plan->head.segments + segment];
    return (Ending){layer->column_sums + (int64_t)segment * plan->head.out, layer->scale + part->weight_group, layer->zero + part->weight_group, threshold->theta,
                    threshold->baseline, total, plan->head.bits == 8 ? 128 * total : 0};
}

/* Sums of `count` rows from `row` on become outputs, which `y` gathers over the segments. */
static inline void end_sums(const Ending *end, int32_t scales, int32_t row, int32_t count, const int32_t *sums, float *y) {
    for (int32_t i = 0; i < count; i++) {
        const int64_t at = (int64_t)(row + i) * scales;
        const int64_t charge = sums[i] + end->lifted - end->zero[at] * end->total - end->baseline * end->column_sums[row + i];
        y[i] += (float)charge * end->theta * end->scale[at];
    }
}

static inline int64_t strips_of(const Header *head) { return (head->out + STRIP - 1) / STRIP; }

/* Unpacked bytes of a row, in the longest segment. */
static inline int32_t stride_of(const Plan *plan) {
    int32_t longest = 0;
    for (int32_t s = 0; s < plan->head.segments; s++) longest = plan->segments[s].blocks > longest ? plan->segments[s].blocks : longest;
    return longest * plan->head.block;
}

/* Token n of x, (tokens, in); room: 2 · (in + 1) floats; codes: `in` bytes in stored order. */
static inline void place_token(const Linear *layer, const void *x, int32_t type, int64_t n, float *room, uint8_t *codes) {
    const Header *head = &layer->plan.head;
    encode_token(&layer->plan, load_row(x, type, n, head->in, room + head->in + 1), room, codes, layer->spikes + n * head->buffer, layer->thresholds + n * head->groups,
                 layer->totals + n * head->segments);
}

/* Outputs of a strip from the tokens that a tile covers at a time: weights are unpacked once. */
static inline void strip_of_many(const Linear *layer, int32_t first, int32_t count, int8_t *unpacked, float *outputs) {
    const Header *head = &layer->plan.head;
    const int32_t stride = stride_of(&layer->plan);
    for (int32_t s = 0; s < head->segments; s++) {
        const Segment *part = &layer->plan.segments[s];
        for (int32_t o = 0; o < STRIP; o++) /* rows beyond the last repeat it */
            unpack_row(layer->packed + (int64_t)(first + (o < count ? o : count - 1)) * head->row_bytes, head->row_bytes, head->bits, head->in, part->first_block, part->blocks,
                       unpacked + (int64_t)o * stride);
        for (int64_t n = 0; n < layer->tokens; n += TOKENS) {
            const int32_t some = (int32_t)(layer->tokens - n < TOKENS ? layer->tokens - n : TOKENS);
            const uint8_t *q[TOKENS];
            Ending ends[TOKENS];
            for (int t = 0; t < TOKENS; t++) q[t] = layer->spikes + (n + (t < some ? t : 0)) * head->buffer + part->offset;
            for (int32_t t = 0; t < some; t++) ends[t] = ending_of(layer, n + t, s);
            for (int32_t o = 0; o < count; o += ROWS) {
                int32_t tile[TOKENS * ROWS];
                dot_tile(q, some, unpacked + (int64_t)o * stride, stride, part->blocks * head->block, tile);
                for (int32_t t = 0; t < some; t++)
                    end_sums(&ends[t], head->scales, first + o, count - o < ROWS ? count - o : ROWS, tile + t * ROWS, outputs + (n + t) * STRIP + o);
            }
        }
    }
}

/* Outputs of a strip of one token, straight from the packed rows; 0 is returned where they have to be unpacked first. */
static inline int strip_of_one(const Linear *layer, int32_t first, int32_t count, float *outputs) {
    const Header *head = &layer->plan.head;
    int32_t sums[STRIP];
    for (int32_t s = 0; s < head->segments; s++) {
        const Segment *part = &layer->plan.segments[s];
        if (!dot_rows(layer->spikes + part->offset, layer->packed + (int64_t)first * head->row_bytes, head->row_bytes, count, head->bits, part->first_block, part->blocks, sums))
            return 0;
        const Ending end = ending_of(layer, 0, s);
        end_sums(&end, head->scales, first, count, sums, outputs);
    }
    return 1;
}

/* A strip for all tokens into y, (tokens, out); unpacked: STRIP · stride bytes; outputs: STRIP · tokens floats. */
static inline void run_strip(const Linear *layer, int64_t strip, int8_t *unpacked, float *outputs, void *y, int32_t type) {
    const Header *head = &layer->plan.head;
    const int32_t first = (int32_t)strip * STRIP, count = head->out - first < STRIP ? head->out - first : STRIP;
    memset(outputs, 0, sizeof(float) * STRIP * (size_t)layer->tokens);
    if (layer->tokens > 1 || !strip_of_one(layer, first, count, outputs)) strip_of_many(layer, first, count, unpacked, outputs);
    for (int64_t n = 0; n < layer->tokens; n++) {
        float *own = outputs + n * STRIP;
        for (int32_t o = 0; layer->bias && o < count; o++) own[o] += layer->bias[first + o];
        store_row(y, type, n * head->out + first, own, count);
    }
}
#endif
