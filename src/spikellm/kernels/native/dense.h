/* Products with 16- or 32-bit weights, which are read once: a few rows of weights at a time for all tokens. */
#ifndef SPIKELLM_DENSE_H
#define SPIKELLM_DENSE_H
#include <math.h>
#include "floats.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define DENSE_ROWS 4
#define DENSE_LANES 32
#define DENSE_AHEAD 4096 /* bytes that the second cache is asked for in advance */

/* A row of inputs in the order in which 16-bit weights are taken apart: of every 32 the even ones, then the odd ones; others as they are. */
static inline void order_inputs(const float *x, int64_t count, int32_t type, float *ordered) {
    int64_t i = 0;
    for (; type == BFLOAT16 && i + DENSE_LANES <= count; i += DENSE_LANES)
        for (int lane = 0; lane < DENSE_LANES; lane++) ordered[i + (lane & 1) * (DENSE_LANES / 2) + lane / 2] = x[i + lane];
    for (; i < count; i++) ordered[i] = x[i];
}

static inline float wide_number(const void *x, int32_t type, int64_t at) {
    if (type == FLOAT32) return ((const float *)x)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Sums of DENSE_ROWS rows of weights, of which those from `rows` on repeat the last, with one row of ordered inputs. */
static inline void dense_sums(const float *x, const void *weights, int32_t type, int64_t columns, int64_t first, int64_t rows, float *sums) {
    int64_t from[DENSE_ROWS], i = 0;
    for (int r = 0; r < DENSE_ROWS; r++) from[r] = (first + (r < rows ? r : rows - 1)) * columns;
#if defined(__AVX512F__)
    __m512 even[DENSE_ROWS], odd[DENSE_ROWS];
    for (int r = 0; r < DENSE_ROWS; r++) even[r] = odd[r] = _mm512_setzero_ps();
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000u);
    for (; i + DENSE_LANES <= columns; i += DENSE_LANES) {
        const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + DENSE_LANES / 2);
        for (int r = 0; r < DENSE_ROWS; r++) {
            __m512 low_part, high_part;
            if (type == FLOAT32) {
                const float *row = (const float *)weights + from[r] + i;
                _mm_prefetch((const char *)((uintptr_t)row + DENSE_AHEAD), _MM_HINT_T1);
                low_part = _mm512_loadu_ps(row);
                high_part = _mm512_loadu_ps(row + DENSE_LANES / 2);
            } else {
                const uint16_t *row = (const uint16_t *)weights + from[r] + i;
                _mm_prefetch((const char *)((uintptr_t)row + DENSE_AHEAD), _MM_HINT_T1);
                const __m512i both = _mm512_loadu_si512(row);
                low_part = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                high_part = _mm512_castsi512_ps(_mm512_and_si512(both, high));
            }
            even[r] = _mm512_fmadd_ps(a, low_part, even[r]);
            odd[r] = _mm512_fmadd_ps(b, high_part, odd[r]);
        }
    }
    for (int r = 0; r < DENSE_ROWS; r++) sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
#else
    for (int r = 0; r < DENSE_ROWS; r++) {
        float lanes[DENSE_LANES] = {0};
        for (i = 0; i + DENSE_LANES <= columns; i += DENSE_LANES) {
            float wide[DENSE_LANES];
            if (type == FLOAT32)
                memcpy(wide, (const float *)weights + from[r] + i, sizeof wide);
            else
                for (int lane = 0; lane < DENSE_LANES / 2; lane++) {
                    uint32_t both;
                    memcpy(&both, (const uint16_t *)weights + from[r] + i + 2 * lane, sizeof both);
                    const uint32_t low = both << 16, high = both & 0xffff0000u; /* the first of two 16-bit numbers is the low half on the processors that this runs on */
                    memcpy(wide + lane, &low, sizeof low);
                    memcpy(wide + DENSE_LANES / 2 + lane, &high, sizeof high);
                }
            for (int lane = 0; lane < DENSE_LANES; lane++) lanes[lane] += x[i + lane] * wide[lane];
        }
        sums[r] = 0.0f;
        for (int lane = 0; lane < DENSE_LANES; lane++) sums[r] += lanes[lane];
    }
#endif
    for (int r = 0; r < DENSE_ROWS; r++)
        for (int64_t c = i; c < columns; c++) sums[r] += x[c] * wide_number(weights, type, from[r] + c);
}
#endif
