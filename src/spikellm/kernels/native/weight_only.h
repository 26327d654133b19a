/* Packed weight codes that meet floats: what a call needs to know of a layer, as one array of 32-bit integers (weight_only_plan.py says the same in Python), and codes as vectors.

   header, then for each segment: first and last stored column, weight group, where its inputs stand, first block of the packed row, blocks; then for each stored column the
   channel it comes from, and where its input stands.

   A block is 64 columns, 8 bytes a bit. Lane j of 16 holds the four codes 4j … 4j+3, so that codes of every width are cut out in the same way: code t of all lanes is one
   vector, and place 16·t + j of a block is that of column 4j + t. Inputs stand in this order; those of other segments are zero there.

   Vectors are those of the compiler, which splits them where the processor has narrower ones. Products are rounded before they are added, and lanes are added in one order,
   so that every level gives the same bits. */
#ifndef SPIKELLM_WEIGHT_ONLY_H
#define SPIKELLM_WEIGHT_ONLY_H
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#define COLUMNS 64 /* of a block */
#define LANES 16
#define CODES 4    /* of a lane */
#define AHEAD 8192 /* bytes that the second cache is asked for in advance */
#define MAGIC 0x4b000000u /* 2**23 as a float, whose last bits count ones */
#define UNROLLED _Pragma("GCC unroll 8")

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

typedef struct { int32_t in, out, bits, segments, row_bytes, scales, buffer; } Header;
typedef struct { int32_t start, stop, weight_group, offset, first_block, blocks; } Segment;
typedef struct { Header head; const Segment *segments; const int32_t *source, *place; } Plan;

static inline Plan read_plan(const int32_t *words) {
    Plan plan;
    plan.head = *(const Header *)words;
    words += sizeof(Header) / sizeof(int32_t);
    plan.segments = (const Segment *)words;
    words += plan.head.segments * (int32_t)(sizeof(Segment) / sizeof(int32_t));
    plan.source = words;
    plan.place = words + plan.head.in;
    return plan;
}

/* Inputs of a token in the order of places; `buffer` of them, zero before. */
static inline void place_inputs(const Plan *plan, const float *x, float *placed) {
    for (int32_t i = 0; i < plan->head.in; i++) placed[plan->place[i]] = x[plan->source[i]];
}

/* What turns codes of one width into integers less a zero-point. Where the width is a constant the steps that it does not need fall away. */
typedef struct { Words gather, shift; Floats values; int32_t first[LANES]; /* byte of every lane */ } Cutter;

static inline void make_cutter(int bits, Cutter *cutter) {
    uint8_t where[4 * LANES];
    for (int j = 0; j < LANES; j++) {
        for (int i = 0; i < 4; i++) where[4 * j + i] = (uint8_t)(CODES * bits * j / 8 + i);
        cutter->first[j] = CODES * bits * j / 8;
        cutter->shift[j] = (uint32_t)(CODES * bits * j % 8);
        cutter->values[j] = (float)(j & ((1 << bits) - 1));
    }
    memcpy(&cutter->gather, where, sizeof where);
}

/* Lanes of the block at byte `at`, codes from their lowest bits on; zero beyond the end of the row, of which no byte is read. */
static inline void cut_lanes(int bits, const Cutter *cutter, const uint8_t *row, int32_t row_bytes, int64_t at, Words *lanes) {
    const int64_t left = row_bytes - at;
#if defined(__AVX512VNNI__)
    _mm_prefetch((const char *)((uintptr_t)row + (uintptr_t)(at + AHEAD)), _MM_HINT_T1);
    const __mmask64 mask = left >= 8 * bits ? ~0ull >> (64 - 8 * bits) : left <= 0 ? 0 : (1ull << left) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(mask, row + at);
    *lanes = (Words)(__builtin_constant_p(bits) && bits == 8 ? bytes : _mm512_permutexvar_epi8((__m512i)cutter->gather, bytes));
#else
    uint8_t tail[COLUMNS + 4] = {0};
    const uint8_t *block = row + at;
    if (left < 8 * bits + 4) { /* a lane is read as four bytes */
        if (left > 0) memcpy(tail, block, (size_t)(left < 8 * bits ? left : 8 * bits));
        block = tail;
    }
    uint32_t words[LANES];
    for (int j = 0; j < LANES; j++) memcpy(words + j, block + cutter->first[j], sizeof *words);
    memcpy(lanes, words, sizeof *lanes);
#endif
    if (!__builtin_constant_p(bits) || bits % 2) *lanes >>= cutter->shift;
}

/* Integers of code t of every lane; `zero` is 2**23 plus the zero-point, `table` has the integer of every code of up to four bits. */
static inline void take_integers(int bits, const Words *lanes, int t, const Floats *zero, const Floats *table, Floats *integers) {
    const Words codes = *lanes >> (uint32_t)(bits * t);
#if defined(__AVX512VNNI__)
    if (__builtin_constant_p(bits) && bits <= 4) { /* four bits alone are looked at */
        *integers = (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)*table);
        return;
    }
#else
    (void)table;
#endif
    *integers = (Floats)((codes & ((1u << bits) - 1u)) | MAGIC) - *zero;
}

static inline float sum_of(const Floats *vector) {
    Floats v = *vector;
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}
#endif
