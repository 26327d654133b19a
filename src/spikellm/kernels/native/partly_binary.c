/* A linear layer of partly binary weights (PB-LLM) on 16- or 32-bit inputs: most weights are ±α, those that a mask marks have codes of their own.

   A row is turned into floats where it is used, in a buffer that the first cache holds, and meets up to four tokens at a time there. Products are rounded before they are
   added, and lanes are added in one order, so that every level gives the same bits. */
#include <stdint.h>
#include <stdlib.h>
#include "floats.h"
#include "weight_only.h"

#define TOKENS 4 /* at a time */

/* head: inputs, outputs, groups, bytes of a row of bits, scales of a row; then the columns of every group, first and one beyond the last. */
typedef struct {
    const int32_t *head, *bounds;
    const uint8_t *mask, *signs, *codes;
    const int64_t *first; /* code of every row's first salient weight; of one row more */
    const float *scale, *salient_scale;
    const uint8_t *salient_zero;
} Rows;

static inline int32_t padded(const Rows *rows) { return (rows->head[0] + LANES - 1) / LANES * LANES; }

/* 16 bits from column c on; nothing is read beyond the row. */
static inline uint32_t bits_at(const uint8_t *row, int32_t bytes, int32_t c) {
    uint32_t word = 0;
    const int32_t at = c / 8, left = bytes - at;
    if (left >= 4)
        memcpy(&word, row + at, 4);
    else
        memcpy(&word, row + at, (size_t)left);
    return word >> (c % 8) & 0xffffu;
}

/* A row in the order of columns, zero behind its end. */
static void decode_row(const Rows *rows, int64_t row, float *out) {
    const int32_t groups = rows->head[2], bytes = rows->head[3];
    const uint8_t *mask = rows->mask + row * bytes, *signs = rows->signs + row * bytes, *code = rows->codes + rows->first[row];
    const float zero = rows->salient_zero[row], step = rows->salient_scale[row];
    for (int32_t g = 0; g < groups; g++) {
        const int32_t start = rows->bounds[2 * g], stop = rows->bounds[2 * g + 1];
        const float scale = rows->scale[row * rows->head[4] + g];
        for (int32_t c = start; c < stop; c += LANES) {
            const int32_t count = stop - c < LANES ? stop - c : LANES;
            const uint32_t here = (1u << count) - 1, salient = bits_at(mask, bytes, c) & here, positive = bits_at(signs, bytes, c);
#if defined(__AVX512VNNI__)
            const __m512 binary = _mm512_mask_blend_ps((__mmask16)positive, _mm512_set1_ps(0.0f - scale), _mm512_set1_ps(scale));
            const int salients = __builtin_popcount(salient);
            const __m512 own = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((__mmask16)((1u << salients) - 1), code)));
            const __m512 values = _mm512_mul_ps(_mm512_sub_ps(own, _mm512_set1_ps(zero)), _mm512_set1_ps(step));
            _mm512_mask_storeu_ps(out + c, (__mmask16)here, _mm512_mask_expand_ps(binary, (__mmask16)salient, values));
            code += salients;
#else
            for (int32_t i = 0; i < count; i++) out[c + i] = salient >> i & 1u ? ((float)*code++ - zero) * step : positive >> i & 1u ? scale : 0.0f - scale;
#endif
        }
    }
    for (int32_t c = rows->head[0]; c < padded(rows); c++) out[c] = 0.0f;
}

/* Products of a row with so many tokens. */
static inline __attribute__((always_inline)) void meet(int tokens, const float *row, const float *const *x, int32_t places, float *sums) {
    Floats acc[TOKENS];
    UNROLLED for (int t = 0; t < tokens; t++) acc[t] = (Floats){0};
    for (int32_t c = 0; c < places; c += LANES) {
        Floats w, v;
        memcpy(&w, row + c, sizeof w);
        UNROLLED for (int t = 0; t < tokens; t++) {
            memcpy(&v, x[t] + c, sizeof v);
            acc[t] += v * w;
        }
    }
    UNROLLED for (int t = 0; t < tokens; t++) sums[t] = sum_of(&acc[t]);
}

static inline Rows read_rows(const int32_t *head, const uint8_t *mask, const uint8_t *signs, const uint8_t *codes, const int64_t *first, const float *scale,
                             const float *salient_scale, const uint8_t *salient_zero) {
    return (Rows){head, head + 5, mask, signs, codes, first, scale, salient_scale, salient_zero};
}

/* Rows from `first_row` on for a matrix product of many tokens: y: (count, in rounded up to 16). */
int32_t spikellm_partly_binary_strip(const int32_t *head, const uint8_t *mask, const uint8_t *signs, const uint8_t *codes, const int64_t *first, const float *scale,
                                     const float *salient_scale, const uint8_t *salient_zero, int64_t first_row, int64_t count, float *y, int32_t threads) {
    const Rows rows = read_rows(head, mask, signs, codes, first, scale, salient_scale, salient_zero);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < count; i++) decode_row(&rows, first_row + i, y + i * padded(&rows));
    return 0;
}

/* Returns 0, or 1 where memory ran out.   x: (tokens, in); bias: (out) or null; y: (tokens, out); type: of x and y, see floats.h. */
int32_t spikellm_partly_binary_linear(const void *x, int64_t tokens, const int32_t *head, const uint8_t *mask, const uint8_t *signs, const uint8_t *codes, const int64_t *first,
                                      const float *scale, const float *salient_scale, const uint8_t *salient_zero, const float *bias, void *y, int32_t type, int32_t threads) {
    const Rows rows = read_rows(head, mask, signs, codes, first, scale, salient_scale, salient_zero);
    const int32_t in = head[0], out = head[1], places = padded(&rows);
    if (tokens == 0 || out == 0) return 0;
    float *placed = calloc((size_t)tokens * (size_t)places + 1, sizeof *placed), *room = malloc(sizeof(float) * ((size_t)in + 1));
    int32_t failed = !placed || !room;
    for (int64_t n = 0; n < tokens && !failed; n++) memcpy(placed + n * places, load_row(x, type, n, in, room), sizeof(float) * (size_t)in);
#pragma omp parallel num_threads(threads) if (threads > 1 && !failed)
    {
        float *row = malloc(sizeof(float) * ((size_t)places + 1));
        const int ready = row && !failed;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int32_t o = 0; o < out; o++) {
            if (!ready) continue;
            decode_row(&rows, o, row);
            for (int64_t n = 0; n < tokens; n += TOKENS) {
                const int64_t some = tokens - n < TOKENS ? tokens - n : TOKENS;
                const float *own[TOKENS]; /* tokens beyond the last repeat it */
                float sums[TOKENS];
                for (int64_t t = 0; t < TOKENS; t++) own[t] = placed + (n + (t < some ? t : some - 1)) * places;
                if (some == 1)
                    meet(1, row, own, places, sums);
                else
                    meet(TOKENS, row, own, places, sums);
                for (int64_t t = 0; t < some; t++) {
                    const float sum = sums[t] + (bias ? bias[o] : 0.0f);
                    store_row(y, type, (n + t) * out + o, &sum, 1);
                }
            }
        }
        free(row);
    }
    free(placed);
    free(room);
    return failed;
}
