/* Attention over cached keys and values that are numbers, not spikes: one head of them, and the heads of queries that share it. A pass of the model library and a step of this
   package call the same function, so that both give the same bits; sums are taken in an order that kernels/torch/numbers.py can take with operators of torch. */
#ifndef SPIKELLM_NUMBERS_H
#define SPIKELLM_NUMBERS_H
#include <stdlib.h>
#include "as_torch.h"
#include "dense.h"

#define HIDDEN -3.4e38f /* score of a key that a query does not see */

typedef struct {
    int64_t tokens;
    int32_t key_size, value_size, type, lanes; /* lanes: of torch's vectors */
    float scaling, softcap;
} Numbers;

/* A row of numbers of a type as floats. */
static inline void widen(const void *rows, int32_t type, int64_t row, int64_t size, float *wide) {
    if (type == FLOAT32)
        memcpy(wide, (const float *)rows + row * size, sizeof(float) * (size_t)size);
    else
        for (int64_t i = 0; i < size; i++) {
            const uint32_t bits = (uint32_t)((const uint16_t *)rows + row * size)[i] << 16;
            memcpy(wide + i, &bits, sizeof bits);
        }
}

/* In lanes, which are folded in halves. */
static inline float product_of(const float *x, const float *y, int64_t count) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane] * y[i + lane];
    for (int64_t lane = 0; i + lane < count; lane++) lanes[lane] += x[i + lane] * y[i + lane];
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

#define TOGETHER 16 /* values that are added up one after the other; sums of so many pairwise, as leaves of a tree */

/* Sums of values by weights: `rows` at once, `stack` holds the sums of subtrees by level. */
static inline void sums_of_values(const Numbers *own, const float *weights, int64_t rows, const void *values, float *wide, float *stack, float *out) {
    const int64_t tokens = own->tokens, size = own->value_size, all = rows * size;
    int64_t leaves = 0;
    for (int64_t start = 0; start < tokens; start += TOGETHER, leaves++) {
        memset(out, 0, sizeof(float) * (size_t)all);
        for (int64_t t = start; t < tokens && t < start + TOGETHER; t++) {
            widen(values, own->type, t, size, wide);
            for (int64_t r = 0; r < rows; r++) {
                const float weight = weights[r * tokens + t];
                float *sums = out + r * size;
                for (int64_t i = 0; i < size; i++) sums[i] += weight * wide[i];
            }
        }
        int64_t level = 0;
        for (; leaves >> level & 1; level++)
            for (int64_t i = 0; i < all; i++) out[i] += stack[level * all + i];
        memcpy(stack + level * all, out, sizeof(float) * (size_t)all);
    }
    memset(out, 0, sizeof(float) * (size_t)all);
    for (int64_t level = 0; leaves >> level; level++)
        for (int64_t i = 0; leaves >> level & 1 && i < all; i++) out[i] += stack[level * all + i];
}

/* query: (rows, key size); keys, values: (tokens, size); seen: (queries, tokens), of row r the line r % queries, null where all see all; out: (rows, value size).
   Returns 0 where memory ran out. */
static inline int attend_to_rows(const Numbers *own, const float *query, int64_t rows, int64_t queries, const void *keys, const void *values, const uint8_t *seen, float *out) {
    const int64_t tokens = own->tokens, key_size = own->key_size, size = own->value_size;
    int64_t levels = 1;
    while (tokens >> levels) levels++;
    float *scores = malloc(sizeof(float) * (size_t)(rows * tokens + key_size + size + levels * rows * size));
    if (!scores) return 0;
    float *wide = scores + rows * tokens;
    for (int64_t t = 0; t < tokens; t++) {
        widen(keys, own->type, t, key_size, wide);
        for (int64_t r = 0; r < rows; r++) {
            float score = product_of(query + r * key_size, wide, key_size) * own->scaling;
            if (own->softcap > 0.0f) score = tanh_of(score / own->softcap) * own->softcap;
            scores[r * tokens + t] = !seen || seen[r % queries * tokens + t] ? score : HIDDEN;
        }
    }
    for (int64_t r = 0; r < rows; r++) softmax_of(scores + r * tokens, tokens, own->lanes);
    sums_of_values(own, scores, rows, values, wide, wide + key_size + size, out);
    free(scores);
    return 1;
}
#endif
