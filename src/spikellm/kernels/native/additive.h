/* Parts of a linear layer of ternary weights that any schedule may call: tables of a token, and sums of a block of outputs.

   Three columns have 27 ternary combinations; the sum of each is added up once a token, in a table of 32. A word holds six such combinations of one output, 5 bits each, so an
   output takes a look into a table and an addition for every three columns and step. No product with a weight is made; one scaling a row and segment ends the sum. */
#ifndef SPIKELLM_ADDITIVE_H
#define SPIKELLM_ADDITIVE_H
#include <stdint.h>
#include <stdlib.h>
#include "floats.h"
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#define OUTPUTS 64 /* that are worked on at a time, and that stand side by side in memory */
#define ENTRIES 32
#define TRIPLES 6 /* in a word */
#define WORDS_AHEAD 8192 /* bytes that the second cache is asked for in advance */

typedef struct { int32_t in, out, segments, scales, words; } AdditiveHeader;
typedef struct { int32_t start, stop, weight_group, planes, first_word, plane_words; } AdditiveSegment;

/* Tables of a segment: entry d0 + 3·d1 + 9·d2 is (d0−1)·a + (d1−1)·b + (d2−1)·c, added up in this order. */
static inline void fill_segment(const float *x, const int32_t *source, const AdditiveSegment *part, float *tables) {
    for (int32_t triple = 0; triple < part->plane_words * TRIPLES; triple++, tables += ENTRIES) {
        float v[3];
        for (int i = 0; i < 3; i++) {
            int32_t column = part->start + triple * 3 + i;
            v[i] = column < part->stop ? x[source[column]] : 0.0f;
        }
        const float a[3] = {0.0f - v[0], 0.0f, v[0]}, b[3] = {0.0f - v[1], 0.0f, v[1]}, c[3] = {0.0f - v[2], 0.0f, v[2]};
        for (int k = 0; k < 3; k++)
            for (int j = 0; j < 3; j++)
                for (int i = 0; i < 3; i++) tables[i + 3 * j + 9 * k] = a[i] + b[j] + c[k];
        for (int i = 27; i < ENTRIES; i++) tables[i] = 0.0f;
    }
}

/* Sums of 64 outputs over one plane of one segment, added to `sums`. */
static inline void add_plane(const uint32_t *words, int32_t count, const float *tables, float *sums) {
#if defined(__AVX512VNNI__)
    __m512 acc[OUTPUTS / 16];
    for (int o = 0; o < OUTPUTS / 16; o++) acc[o] = _mm512_loadu_ps(sums + 16 * o);
    for (int32_t w = 0; w < count; w++, words += OUTPUTS) {
        __m512i index[OUTPUTS / 16];
        for (int o = 0; o < OUTPUTS / 16; o++) {
            _mm_prefetch((const char *)((uintptr_t)(words + 16 * o) + WORDS_AHEAD), _MM_HINT_T1);
            index[o] = _mm512_loadu_si512(words + 16 * o);
        }
        for (int triple = 0; triple < TRIPLES; triple++, tables += ENTRIES) {
            const __m512 low = _mm512_loadu_ps(tables), high = _mm512_loadu_ps(tables + 16);
            for (int o = 0; o < OUTPUTS / 16; o++) {
                acc[o] = _mm512_add_ps(acc[o], _mm512_permutex2var_ps(low, index[o], high)); /* looks at five bits alone */
                index[o] = _mm512_srli_epi32(index[o], 5);
            }
        }
    }
    for (int o = 0; o < OUTPUTS / 16; o++) _mm512_storeu_ps(sums + 16 * o, acc[o]);
#else
    for (int32_t w = 0; w < count; w++, words += OUTPUTS, tables += TRIPLES * ENTRIES)
        for (int o = 0; o < OUTPUTS; o++)
            for (int triple = 0; triple < TRIPLES; triple++) sums[o] += tables[triple * ENTRIES + ((words[o] >> (5 * triple)) & 31)];
#endif
}

/* A layer; plan: header, segments, then the channel of every stored column; words: (blocks of 64 outputs, words, 64); scale: (out, scales); bias: (out) or null. */
typedef struct {
    const AdditiveHeader *head;
    const AdditiveSegment *segments;
    const int32_t *source;
    const uint32_t *words;
    const float *scale, *bias;
} Additive;

static inline Additive read_additive(const int32_t *plan, const uint32_t *words, const float *scale, const float *bias) {
    const AdditiveHeader *head = (const AdditiveHeader *)plan;
    const AdditiveSegment *segments = (const AdditiveSegment *)(plan + sizeof(AdditiveHeader) / sizeof(int32_t));
    return (Additive){head, segments, (const int32_t *)(segments + head->segments), words, scale, bias};
}

/* Floats of the tables of a token; they stand at multiples of 64 bytes. */
static inline size_t table_size(const Additive *layer) {
    size_t size = 0;
    for (int32_t s = 0; s < layer->head->segments; s++) size += (size_t)layer->segments[s].plane_words * TRIPLES * ENTRIES;
    return size;
}

static inline void fill_tables(const Additive *layer, const float *x, float *tables) {
    for (int32_t s = 0; s < layer->head->segments; s++) {
        fill_segment(x, layer->source, &layer->segments[s], tables);
        tables += (size_t)layer->segments[s].plane_words * TRIPLES * ENTRIES;
    }
}

static inline int32_t blocks_of(const Additive *layer) { return (layer->head->out + OUTPUTS - 1) / OUTPUTS; }

/* A block of outputs of a token from its tables into y at element `at` of the token's first output. */
static inline void run_block(const Additive *layer, int32_t block, const float *tables, void *y, int32_t type, int64_t at) {
    const AdditiveHeader *head = layer->head;
    const int32_t first = block * OUTPUTS, count = head->out - first < OUTPUTS ? head->out - first : OUTPUTS;
    const uint32_t *own = layer->words + (int64_t)block * head->words * OUTPUTS;
    float total[OUTPUTS] = {0};
    for (int32_t s = 0; s < head->segments; s++) {
        const AdditiveSegment *part = &layer->segments[s];
        float sums[OUTPUTS] = {0};
        for (int32_t t = 0; t < part->planes; t++) add_plane(own + ((int64_t)part->first_word + (int64_t)t * part->plane_words) * OUTPUTS, part->plane_words, tables, sums);
        for (int32_t o = 0; o < count; o++) total[o] += sums[o] * layer->scale[(int64_t)(first + o) * head->scales + part->weight_group];
        tables += (size_t)part->plane_words * TRIPLES * ENTRIES;
    }
    for (int32_t o = 0; o < count; o++) total[o] = total[o] + (layer->bias ? layer->bias[first + o] : 0.0f);
    store_row(y, type, at + first, total, count);
}
#endif
