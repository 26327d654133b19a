/* Attention over cached keys and values that are numbers, not spikes: one head of them, and the heads of queries that share it. A pass of the model library and a step of this
   package call the same function, so that both give the same bits. */
#ifndef SPIKELLM_NUMBERS_H
#define SPIKELLM_NUMBERS_H
#include "as_torch.h"
#include "dense.h"

#define HIDDEN -3.4e38f /* score of a key that a query does not see */

typedef struct {
    int64_t tokens;
    int32_t key_size, value_size, type;
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

static inline float product_of(const float *x, const float *y, int64_t count) {
    float lanes[LANES] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane] * y[i + lane];
    for (; i < count; i++) sum += x[i] * y[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0] + sum;
}

/* query: (rows, key size); keys, values: (tokens, size); seen: (queries, tokens), of row r the line r % queries, null where all see all; out: (rows, value size).
   Returns 0 where memory ran out. */
static inline int attend_to_rows(const Numbers *own, const float *query, int64_t rows, int64_t queries, const void *keys, const void *values, const uint8_t *seen, float *out) {
    const int64_t tokens = own->tokens, key_size = own->key_size, size = own->value_size;
    float *scores = malloc(sizeof(float) * (size_t)(rows * tokens + key_size + size));
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
    for (int64_t r = 0; r < rows; r++) softmax_of(scores + r * tokens, tokens, LANES);
    memset(out, 0, sizeof(float) * (size_t)(rows * size));
    for (int64_t t = 0; t < tokens; t++) {
        widen(values, own->type, t, size, wide);
        for (int64_t r = 0; r < rows; r++) {
            const float weight = scores[r * tokens + t];
            float *sums = out + r * size;
            for (int64_t i = 0; i < size; i++) sums[i] += weight * wide[i];
        }
    }
    free(scores);
    return 1;
}
#endif
