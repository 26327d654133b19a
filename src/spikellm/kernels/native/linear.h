/* A spiking linear layer in two parts that any schedule may call: coding of tokens, and sums of a strip of rows for all tokens.

   y[n, o] = Σ_segments (Σ_c q[n, c]·(code[o, c] − zero[o]) − z[n]·Σ_c (code[o, c] − zero[o])) · θ[n] · scale[o]   (+ bias[o]), segments in order, float32 without contraction */
#ifndef SPIKELLM_LINEAR_H
#define SPIKELLM_LINEAR_H
#include "dot.h"
#include "encode.h"
#include "floats.h"
#include "tiles.h"

#define STRIP 32 /* rows of weights that are unpacked at a time: with their columns they fit into a second-level cache */

/* A layer, its tensors, and what its tokens were coded to.

   packed: (out, row_bytes); scale, zero: (out, scales); column_sums: (segments, out), Σ (code − zero); bias: (out) or null; spikes: (tokens, buffer), zero where no column
   stands; thresholds: (tokens, groups); totals: (tokens, segments); tiled: `spikes` has room for whole tiles of tokens, see tiles_pay. */
typedef struct {
    Plan plan;
    const uint8_t *packed, *zero;
    const float *scale, *bias;
    const int32_t *column_sums;
    int64_t tokens;
    uint8_t *spikes;
    Threshold *thresholds;
    int32_t *totals, tiled;
} Linear;

/* Whether so many tokens are worth the processor's tiles, if it has some. */
static inline int tiles_pay(int64_t tokens) {
#if defined(__AMX_INT8__)
    return tokens >= FEWEST;
#else
    (void)tokens;
    return 0;
#endif
}

/* Tokens that `spikes` has room for, whole tiles of them. */
static inline int64_t room_of(int64_t tokens) { return tiles_pay(tokens) ? (tokens + TILE - 1) / TILE * TILE : tokens; }

/* Bytes of what so many tokens are coded to: thresholds, totals, spikes. */
static inline size_t coded_bytes(const Header *head, int64_t tokens) {
    const size_t each = sizeof(Threshold) * (size_t)head->groups + sizeof(int32_t) * (size_t)head->segments;
    return (size_t)tokens * each + (size_t)room_of(tokens) * (size_t)head->buffer + 1;
}

/* Let a layer's tokens be coded to `memory`, coded_bytes of it; it holds them already where `taken`, by a layer that codes alike. */
static inline void code_to(Linear *layer, void *memory, int taken) {
    const Header *head = &layer->plan.head;
    layer->thresholds = memory;
    layer->totals = (int32_t *)(layer->thresholds + layer->tokens * head->groups);
    layer->spikes = (uint8_t *)(layer->totals + layer->tokens * head->segments);
    layer->tiled = tiles_pay(layer->tokens);
    if (!taken) memset(layer->spikes, 0, (size_t)room_of(layer->tokens) * (size_t)head->buffer);
}

/* What all rows of weights share in one segment and token. */
typedef struct { float theta; uint32_t baseline, total, lifted; } Ending;

static inline Ending ending_of(const Linear *layer, int64_t token, int32_t segment) {
    const Plan *plan = &layer->plan;
    const Threshold *threshold = layer->thresholds + token * plan->head.groups + plan->segments[segment].group;
    const uint32_t total = (uint32_t)layer->totals[token * plan->head.segments + segment];
    return (Ending){threshold->theta, (uint32_t)threshold->baseline, total, plan->head.bits == 8 ? 128 * total : 0};
}

/* What rows of a strip have of their own in one segment; rows beyond the last repeat it. */
typedef struct { uint32_t zero[STRIP]; int32_t column_sums[STRIP]; float scale[STRIP]; } Rows;

static inline void find_rows(const Linear *layer, int32_t segment, int32_t first, int32_t count, Rows *rows) {
    const Plan *plan = &layer->plan;
    for (int32_t i = 0; i < STRIP; i++) {
        const int64_t row = first + (i < count ? i : count - 1), at = row * plan->head.scales + plan->segments[segment].weight_group;
        rows->zero[i] = layer->zero[at];
        rows->column_sums[i] = layer->column_sums[(int64_t)segment * plan->head.out + row];
        rows->scale[i] = layer->scale[at];
    }
}

/* Sums of the rows of a strip become outputs, which `y` gathers over the segments. A layer is taken only if no charge exceeds 32 bits (linear_plan.py); terms of them may wrap
   around. */
static inline void end_strip(Ending end, const Rows *rows, const int32_t *sums, float *y) {
    for (int32_t i = 0; i < STRIP; i++) {
        const uint32_t charge = (uint32_t)sums[i] + end.lifted - rows->zero[i] * end.total - end.baseline * (uint32_t)rows->column_sums[i];
        y[i] += (float)(int32_t)charge * end.theta * rows->scale[i];
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

/* Bytes that run_strip needs for unpacked weights: those of a strip, and for tiles once more. */
static inline size_t unpacked_bytes(const Linear *layer) { return (size_t)STRIP * (size_t)stride_of(&layer->plan) * (layer->tiled ? 2 : 1) + 1; }

/* Sums of the tokens that dot_tile covers at a time with the rows of a strip: (tokens, rows). */
static inline void sums_of_dots(const Linear *layer, const Segment *part, int64_t first, int32_t some, const int8_t *unpacked, int32_t stride, int32_t *sums) {
    const uint8_t *q[TOKENS];
    for (int t = 0; t < TOKENS; t++) q[t] = layer->spikes + (first + (t < some ? t : 0)) * layer->plan.head.buffer + part->offset;
    for (int32_t o = 0; o < STRIP; o += ROWS) {
        int32_t tile[TOKENS * ROWS];
        dot_tile(q, some, unpacked + (int64_t)o * stride, stride, part->blocks * layer->plan.head.block, tile);
        for (int32_t t = 0; t < some; t++) memcpy(sums + t * STRIP + o, tile + t * ROWS, sizeof(int32_t) * ROWS);
    }
}

/* Outputs of a strip from the tokens that are covered at a time: weights are unpacked once. */
static inline void strip_of_many(const Linear *layer, int32_t first, int32_t count, int8_t *unpacked, float *outputs) {
    const Header *head = &layer->plan.head;
    const int32_t stride = stride_of(&layer->plan), tokens = layer->tiled ? TILED : TOKENS;
    if (layer->tiled) open_tiles();
    for (int32_t s = 0; s < head->segments; s++) {
        const Segment *part = &layer->plan.segments[s];
        int32_t sums[TILED * STRIP];
        Rows rows;
        find_rows(layer, s, first, count, &rows);
        for (int32_t o = 0; o < STRIP; o++) /* rows beyond the last repeat it */
            unpack_row(layer->packed + (int64_t)(first + (o < count ? o : count - 1)) * head->row_bytes, head->row_bytes, head->bits, head->in, part->first_block, part->blocks,
                       unpacked + (int64_t)o * stride);
#if defined(__AMX_INT8__)
        int8_t *tiles = unpacked + (int64_t)STRIP * stride;
        const int32_t steps = part->blocks * head->block / BYTES;
        if (layer->tiled) tiles_of_strip(unpacked, stride, steps, tiles);
#endif
        for (int64_t n = 0; n < layer->tokens; n += tokens) {
            const int32_t some = (int32_t)(layer->tokens - n < tokens ? layer->tokens - n : tokens);
#if defined(__AMX_INT8__)
            if (layer->tiled)
                sums_of_tiles(layer->spikes + n * head->buffer + part->offset, head->buffer, some, tiles, steps, sums);
            else
#endif
                sums_of_dots(layer, part, n, some, unpacked, stride, sums);
            for (int32_t t = 0; t < some; t++) end_strip(ending_of(layer, n + t, s), &rows, sums + t * STRIP, outputs + (n + t) * STRIP);
        }
    }
    if (layer->tiled) close_tiles();
}

/* Outputs of a strip of one token, straight from the packed rows; 0 is returned where they have to be unpacked first. */
static inline int strip_of_one(const Linear *layer, int32_t first, int32_t count, float *outputs) {
    const Header *head = &layer->plan.head;
    int32_t sums[STRIP] = {0}; /* of rows beyond the last */
    for (int32_t s = 0; s < head->segments; s++) {
        const Segment *part = &layer->plan.segments[s];
        if (!dot_rows(layer->spikes + part->offset, layer->packed + (int64_t)first * head->row_bytes, head->row_bytes, count, head->bits, part->first_block, part->blocks, sums))
            return 0;
        Rows rows;
        find_rows(layer, s, first, count, &rows);
        end_strip(ending_of(layer, 0, s), &rows, sums, outputs);
    }
    return 1;
}

/* A strip for all tokens into y, (tokens, out); unpacked: unpacked_bytes; outputs: STRIP · tokens floats. */
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
