/* Sums of spike counts times packed weight codes, for a segment of rows of weights. Counts are unsigned bytes, weight codes at most 127, or 8-bit codes less 128.

   dot_packed: one token and row, straight from the packed bytes.   unpack_row, dot_tile: weights as bytes first, for many tokens. */
#ifndef SPIKELLM_DOT_H
#define SPIKELLM_DOT_H
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#define ROWS 4
#define TOKENS 6
#define UNROLLED _Pragma("GCC unroll 8")
#define BYTES 64 /* of a block of unpacked weights, and of a load */

/* A code of any number of bits from a row; reads no byte beyond the row. */
static inline uint8_t code_at(const uint8_t *row, int32_t row_bytes, int32_t bits, int64_t column) {
    int64_t bit = column * bits;
    int32_t byte = (int32_t)(bit >> 3);
    uint32_t word = row[byte];
    if (byte + 1 < row_bytes) word |= (uint32_t)row[byte + 1] << 8;
    return (uint8_t)((word >> (bit & 7)) & ((1u << bits) - 1u));
}

/* 64 bytes of a packed row from `at` on; zero beyond its end. */
static inline void load_block(const uint8_t *row, int32_t row_bytes, int64_t at, uint8_t *block) {
    int64_t left = row_bytes - at;
    if (left < BYTES) memset(block, 0, BYTES);
    if (left > 0) memcpy(block, row + at, (size_t)(left < BYTES ? left : BYTES));
}

#if defined(__AVX512VNNI__)
static inline __m512i packed_block(const uint8_t *row, int64_t at, int64_t left) {
    return left >= BYTES ? _mm512_loadu_si512(row + at) : left <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8((1ull << left) - 1, row + at);
}

/* 24 bytes hold 64 codes of 3 bits: three bytes to a lane of eight, out of which eight fields are cut. */
typedef struct { __m512i gather, cut, mask; } Cutter;

static inline Cutter three_bits(void) {
    uint8_t where[BYTES], shifts[BYTES];
    for (int i = 0; i < BYTES; i++) {
        where[i] = (uint8_t)(i % 8 < 3 ? i / 8 * 3 + i % 8 : 63); /* byte 63 of a load of 24 is zero */
        shifts[i] = (uint8_t)(i % 8 * 3);
    }
    return (Cutter){_mm512_loadu_si512(where), _mm512_loadu_si512(shifts), _mm512_set1_epi8(7)};
}

static inline __m512i cut_block(const Cutter *cutter, const uint8_t *row, int64_t at, int64_t left) {
    const __mmask64 mask = left >= 24 ? 0xffffff : left <= 0 ? 0 : (1ull << left) - 1;
    const __m512i bytes = _mm512_permutexvar_epi8(cutter->gather, _mm512_maskz_loadu_epi8(mask, row + at));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(cutter->cut, bytes), cutter->mask);
}
#endif

/* Weights of one segment of a row as signed bytes, in the order of the spike counts. */
static inline void unpack_row(const uint8_t *row, int32_t row_bytes, int32_t bits, int32_t columns, int32_t first, int32_t blocks, int8_t *out) {
#if defined(__AVX512VNNI__)
    const __m512i nibble = _mm512_set1_epi8(15), pair = _mm512_set1_epi8(3), sign = _mm512_set1_epi8((char)0x80);
    int64_t at = (int64_t)first * (bits == 3 ? 24 : BYTES);
    if (bits == 4) {
        for (int32_t b = 0; b < blocks; b++, at += BYTES, out += 2 * BYTES) {
            const __m512i w = packed_block(row, at, row_bytes - at);
            _mm512_storeu_si512(out, _mm512_and_si512(w, nibble));
            _mm512_storeu_si512(out + BYTES, _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble));
        }
        return;
    }
    if (bits == 2) {
        for (int32_t b = 0; b < blocks; b++, at += BYTES, out += 4 * BYTES) {
            const __m512i w = packed_block(row, at, row_bytes - at);
            _mm512_storeu_si512(out, _mm512_and_si512(w, pair));
            _mm512_storeu_si512(out + BYTES, _mm512_and_si512(_mm512_srli_epi16(w, 2), pair));
            _mm512_storeu_si512(out + 2 * BYTES, _mm512_and_si512(_mm512_srli_epi16(w, 4), pair));
            _mm512_storeu_si512(out + 3 * BYTES, _mm512_and_si512(_mm512_srli_epi16(w, 6), pair));
        }
        return;
    }
    if (bits == 8) {
        for (int32_t b = 0; b < blocks; b++, at += BYTES, out += BYTES) _mm512_storeu_si512(out, _mm512_xor_si512(packed_block(row, at, row_bytes - at), sign));
        return;
    }
    if (bits == 3) {
        const Cutter cutter = three_bits();
        for (int32_t b = 0; b < blocks; b++, at += 24, out += BYTES) _mm512_storeu_si512(out, cut_block(&cutter, row, at, row_bytes - at));
        return;
    }
#endif
    uint8_t block[BYTES];
    if (bits == 2 || bits == 4) {
        int32_t fields = 8 / bits, mask = (1 << bits) - 1;
        for (int32_t b = 0; b < blocks; b++) {
            load_block(row, row_bytes, (int64_t)(first + b) * BYTES, block);
            for (int32_t field = 0; field < fields; field++, out += BYTES)
                for (int32_t i = 0; i < BYTES; i++) out[i] = (int8_t)((block[i] >> (field * bits)) & mask);
        }
    } else if (bits == 8) {
        for (int32_t b = 0; b < blocks; b++, out += BYTES) {
            load_block(row, row_bytes, (int64_t)(first + b) * BYTES, block);
            for (int32_t i = 0; i < BYTES; i++) out[i] = (int8_t)(block[i] ^ 0x80);
        }
    } else {
        int64_t column = (int64_t)first * BYTES;
        for (int32_t i = 0; i < blocks * BYTES; i++, column++) out[i] = column < columns ? (int8_t)code_at(row, row_bytes, bits, column) : 0;
    }
}

#if defined(__AVX512VNNI__)

/* A tile of sums: every weight that is loaded serves all tokens, every count all rows, and all sums stay in registers. */
static __attribute__((noinline)) void dot_tile(const uint8_t *const *q, int32_t tokens, const int8_t *w, int32_t stride, int32_t length, int32_t *sums) {
    (void)tokens; /* those beyond it repeat the first and are not looked at */
    __m512i acc[TOKENS][ROWS];
    UNROLLED for (int t = 0; t < TOKENS; t++) UNROLLED for (int r = 0; r < ROWS; r++) acc[t][r] = _mm512_setzero_si512();
    const int8_t *w0 = w, *w1 = w + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    for (int32_t i = 0; i < length; i += BYTES) {
        const __m512i weights[ROWS] = {_mm512_loadu_si512(w0 + i), _mm512_loadu_si512(w1 + i), _mm512_loadu_si512(w2 + i), _mm512_loadu_si512(w3 + i)};
        UNROLLED for (int t = 0; t < TOKENS; t++) {
            const __m512i spikes = _mm512_loadu_si512(q[t] + i);
            UNROLLED for (int r = 0; r < ROWS; r++) acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], spikes, weights[r]);
        }
    }
    UNROLLED for (int t = 0; t < TOKENS; t++) UNROLLED for (int r = 0; r < ROWS; r++) sums[t * ROWS + r] = _mm512_reduce_add_epi32(acc[t][r]);
}

/* Rows are read once and one after the other, as a stream. Asking the second cache for bytes of some rows ahead hides the memory's latency where rows are short;
   a stream that is read faster (8 bits) the processor sees by itself. */
#define AHEAD 8192
static inline void fetch_ahead(const uint8_t *row, int64_t at) { _mm_prefetch((const char *)((uintptr_t)row + (uintptr_t)(at + AHEAD)), _MM_HINT_T1); }

static inline int dot_packed(const uint8_t *q, const uint8_t *row, int32_t row_bytes, int32_t bits, int32_t first, int32_t blocks, int32_t *sum) {
    __m512i acc = _mm512_setzero_si512(), other = acc, third = acc, fourth = acc;
    const __m512i nibble = _mm512_set1_epi8(15), pair = _mm512_set1_epi8(3), sign = _mm512_set1_epi8((char)0x80);
    int64_t at = (int64_t)first * BYTES;
    if (bits == 4) {
        for (int32_t b = 0; b < blocks; b++, at += BYTES, q += 2 * BYTES) {
            fetch_ahead(row, at);
            const __m512i w = packed_block(row, at, row_bytes - at);
            acc = _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(q), _mm512_and_si512(w, nibble));
            other = _mm512_dpbusd_epi32(other, _mm512_loadu_si512(q + BYTES), _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble));
        }
    } else if (bits == 2) {
        for (int32_t b = 0; b < blocks; b++, at += BYTES, q += 4 * BYTES) {
            fetch_ahead(row, at);
            const __m512i w = packed_block(row, at, row_bytes - at);
            acc = _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(q), _mm512_and_si512(w, pair));
            other = _mm512_dpbusd_epi32(other, _mm512_loadu_si512(q + BYTES), _mm512_and_si512(_mm512_srli_epi16(w, 2), pair));
            third = _mm512_dpbusd_epi32(third, _mm512_loadu_si512(q + 2 * BYTES), _mm512_and_si512(_mm512_srli_epi16(w, 4), pair));
            fourth = _mm512_dpbusd_epi32(fourth, _mm512_loadu_si512(q + 3 * BYTES), _mm512_and_si512(_mm512_srli_epi16(w, 6), pair));
        }
    } else if (bits == 8) {
        for (int32_t b = 0; b < blocks; b++, at += BYTES, q += BYTES)
            acc = _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(q), _mm512_xor_si512(packed_block(row, at, row_bytes - at), sign));
    } else if (bits == 3) {
        const Cutter cutter = three_bits();
        at = (int64_t)first * 24;
        for (int32_t b = 0; b < blocks; b++, at += 24, q += BYTES)
            acc = _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(q), cut_block(&cutter, row, at, row_bytes - at));
    } else {
        return 0;
    }
    *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(acc, other), _mm512_add_epi32(third, fourth)));
    return 1;
}

/* Four rows of 4-bit codes at once: spike counts are loaded once, and sums end together. */
static inline void dot_nibbles(const uint8_t *q, const uint8_t *rows, int32_t row_bytes, int32_t first, int32_t blocks, int32_t *sums) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i acc[ROWS], other[ROWS];
    UNROLLED for (int r = 0; r < ROWS; r++) acc[r] = other[r] = _mm512_setzero_si512();
    int64_t at = (int64_t)first * BYTES;
    for (int32_t b = 0; b < blocks; b++, at += BYTES, q += 2 * BYTES) {
        const __m512i low = _mm512_loadu_si512(q), high = _mm512_loadu_si512(q + BYTES);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            const uint8_t *row = rows + (int64_t)r * row_bytes;
            fetch_ahead(row, at);
            const __m512i w = packed_block(row, at, row_bytes - at);
            acc[r] = _mm512_dpbusd_epi32(acc[r], low, _mm512_and_si512(w, nibble));
            other[r] = _mm512_dpbusd_epi32(other[r], high, _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble));
        }
    }
    UNROLLED for (int r = 0; r < ROWS; r++) acc[r] = _mm512_add_epi32(acc[r], other[r]);
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[0], acc[1]), _mm512_unpackhi_epi32(acc[0], acc[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[2], acc[3]), _mm512_unpackhi_epi32(acc[2], acc[3]));
    const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    _mm_storeu_si128((__m128i *)sums, _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1)));
}

#elif defined(__AVX2__)

static inline int32_t sum_of(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

/* Products of bytes through 16 bits: no pair of products saturates. */
static inline __m256i add_products(__m256i acc, const uint8_t *q, const int8_t *w) {
    __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)q)), b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

static inline void dot_tile(const uint8_t *const *q, int32_t tokens, const int8_t *w, int32_t stride, int32_t length, int32_t *sums) {
    for (int t = 0; t < tokens; t++) {
        __m256i acc[ROWS];
        for (int r = 0; r < ROWS; r++) acc[r] = _mm256_setzero_si256();
        for (int32_t i = 0; i < length; i += 16)
            for (int r = 0; r < ROWS; r++) acc[r] = add_products(acc[r], q[t] + i, w + (int64_t)r * stride + i);
        for (int r = 0; r < ROWS; r++) sums[t * ROWS + r] = sum_of(acc[r]);
    }
}

static inline int dot_packed(const uint8_t *q, const uint8_t *row, int32_t row_bytes, int32_t bits, int32_t first, int32_t blocks, int32_t *sum) {
    if (bits != 2 && bits != 4) return 0;
    const __m256i mask = _mm256_set1_epi8(bits == 4 ? 15 : 3), ones = _mm256_set1_epi16(1);
    int32_t fields = 8 / bits;
    __m256i acc = _mm256_setzero_si256();
    for (int32_t b = 0; b < blocks; b++, q += fields * BYTES) {
        int64_t at = (int64_t)(first + b) * BYTES;
        uint8_t tail[BYTES];
        const uint8_t *block = row + at;
        if (row_bytes - at < BYTES) {
            load_block(row, row_bytes, at, tail);
            block = tail;
        }
        for (int half = 0; half < BYTES; half += 32) {
            __m256i w = _mm256_loadu_si256((const __m256i *)(block + half));
            for (int32_t field = 0; field < fields; field++) { /* counts of at most 255 times codes of at most 15: pairs stay below 2**15 */
                __m256i codes = _mm256_and_si256(_mm256_srli_epi16(w, field * bits), mask);
                __m256i spikes = _mm256_loadu_si256((const __m256i *)(q + field * BYTES + half));
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(spikes, codes), ones));
            }
        }
    }
    *sum = sum_of(acc);
    return 1;
}

#elif defined(__ARM_FEATURE_DOTPROD)

/* Sum of spike counts. */
static inline uint32_t sum_of_counts(const uint8_t *q, int32_t length) {
    const uint8x16_t ones = vdupq_n_u8(1);
    uint32x4_t acc = vdupq_n_u32(0);
    for (int32_t i = 0; i < length; i += 16) acc = vdotq_u32(acc, vld1q_u8(q + i), ones);
    return vaddvq_u32(acc);
}

/* Products of unsigned bytes: weights are raised by 128, which sums of spike counts pay for. */
static inline __attribute__((always_inline)) void dot_some(const uint8_t *const *q, const int tokens, const int8_t *w, int32_t stride, int32_t length, int32_t *sums) {
    const uint8x16_t raised = vdupq_n_u8(0x80);
    uint32x4_t acc[TOKENS][ROWS];
    UNROLLED for (int t = 0; t < tokens; t++) UNROLLED for (int r = 0; r < ROWS; r++) acc[t][r] = vdupq_n_u32(0);
    for (int32_t i = 0; i < length; i += 16) {
        uint8x16_t weights[ROWS];
        UNROLLED for (int r = 0; r < ROWS; r++) weights[r] = veorq_u8(vld1q_u8((const uint8_t *)w + (int64_t)r * stride + i), raised);
        UNROLLED for (int t = 0; t < tokens; t++) {
            const uint8x16_t spikes = vld1q_u8(q[t] + i);
            UNROLLED for (int r = 0; r < ROWS; r++) acc[t][r] = vdotq_u32(acc[t][r], spikes, weights[r]);
        }
    }
    UNROLLED for (int t = 0; t < tokens; t++) {
        const uint32_t charge = 128 * sum_of_counts(q[t], length);
        UNROLLED for (int r = 0; r < ROWS; r++) sums[t * ROWS + r] = (int32_t)(vaddvq_u32(acc[t][r]) - charge);
    }
}

static inline void dot_tile(const uint8_t *const *q, int32_t tokens, const int8_t *w, int32_t stride, int32_t length, int32_t *sums) {
    if (tokens > TOKENS / 2)
        dot_some(q, TOKENS, w, stride, length, sums); /* those beyond repeat the first and are not looked at */
    else if (tokens > 1)
        dot_some(q, TOKENS / 2, w, stride, length, sums);
    else
        dot_some(q, 1, w, stride, length, sums);
}

static inline int dot_packed(const uint8_t *q, const uint8_t *row, int32_t row_bytes, int32_t bits, int32_t first, int32_t blocks, int32_t *sum) {
    if (bits != 2 && bits != 4 && bits != 8) return 0;
    const int32_t fields = 8 / bits;
    const uint8x16_t mask = vdupq_n_u8((uint8_t)((1u << bits) - 1u));
    const uint8_t *const counts = q;
    uint32x4_t acc[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
    for (int32_t b = 0; b < blocks; b++, q += fields * BYTES) {
        const int64_t at = (int64_t)(first + b) * BYTES;
        uint8_t tail[BYTES];
        const uint8_t *block = row + at;
        if (row_bytes - at < BYTES) {
            load_block(row, row_bytes, at, tail);
            block = tail;
        }
        for (int part = 0; part < BYTES; part += 16) {
            const uint8x16_t w = vld1q_u8(block + part);
            for (int32_t field = 0; field < fields; field++) {
                const uint8x16_t codes = vandq_u8(vshlq_u8(w, vdupq_n_s8((int8_t)(-field * bits))), mask);
                acc[field] = vdotq_u32(acc[field], vld1q_u8(q + field * BYTES + part), codes);
            }
        }
    }
    const uint32_t total = vaddvq_u32(vaddq_u32(vaddq_u32(acc[0], acc[1]), vaddq_u32(acc[2], acc[3])));
    *sum = (int32_t)(total - (bits == 8 ? 128 * sum_of_counts(counts, blocks * BYTES) : 0));
    return 1;
}

#else

static inline void dot_tile(const uint8_t *const *q, int32_t tokens, const int8_t *w, int32_t stride, int32_t length, int32_t *sums) {
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++) {
            int32_t sum = 0;
            for (int32_t i = 0; i < length; i++) sum += (int32_t)q[t][i] * (int32_t)w[(int64_t)r * stride + i];
            sums[t * ROWS + r] = sum;
        }
}

static inline int dot_packed(const uint8_t *q, const uint8_t *row, int32_t row_bytes, int32_t bits, int32_t first, int32_t blocks, int32_t *sum) {
    (void)q, (void)row, (void)row_bytes, (void)bits, (void)first, (void)blocks, (void)sum;
    return 0; /* weights are unpacked first */
}

#endif

/* Sums of one token over `count` packed rows; 0 is returned where weights have to be unpacked first. */
static inline int dot_rows(const uint8_t *q, const uint8_t *packed, int32_t row_bytes, int32_t count, int32_t bits, int32_t first, int32_t blocks, int32_t *sums) {
    int32_t o = 0;
#if defined(__AVX512VNNI__)
    for (; bits == 4 && o + ROWS <= count; o += ROWS) dot_nibbles(q, packed + (int64_t)o * row_bytes, row_bytes, first, blocks, sums + o);
#endif
    for (; o < count; o++)
        if (!dot_packed(q, packed + (int64_t)o * row_bytes, row_bytes, bits, first, blocks, sums + o)) return 0;
    return 1;
}
#endif
