/* Sums over rows of what a table holds for the size of a code: profiling counts spikes so, all execution modes in one pass. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FIELDS 4 /* of 16 bits, in a word of the table */
#define ROWS 4   /* whose words are added before they are stored */

static void spill(uint64_t *words, int64_t channels, int64_t *sums) {
    for (int64_t c = 0; c < channels; c++) {
        for (int f = 0; f < FIELDS; f++) sums[FIELDS * c + f] += (int64_t)(words[c] >> 16 * f & 0xffff);
        words[c] = 0;
    }
}

static inline uint32_t size_of(int32_t code) { return (uint32_t)(code < 0 ? -code : code); }

/* Some rows of codes and baselines of one type, the latter with strides; nonzero if a size is not in the table, which is not asked of bytes. */
#define DEFINE_ADD(name, type, checked)                                                                                                         \
    static inline uint32_t name(const type *restrict q, const type *restrict z, const int64_t rows, int64_t channels, const int64_t strides[2], \
                                const uint64_t *restrict table, uint32_t last, uint64_t *restrict own, uint64_t *restrict zero) {               \
        uint32_t beyond = 0;                                                                                                                    \
        for (int64_t c = 0; c < channels; c++) {                                                                                                \
            uint64_t a = 0, b = 0;                                                                                                              \
            for (int64_t r = 0; r < rows; r++) {                                                                                                \
                const int32_t code = (int32_t)q[r * channels + c];                                                                              \
                uint32_t above = size_of(code - (int32_t)z[r * strides[0] + c * strides[1]]), whole = size_of(code);                            \
                if (checked) {                                                                                                                  \
                    beyond |= (above > last) | (whole > last);                                                                                  \
                    above = above > last ? last : above;                                                                                        \
                    whole = whole > last ? last : whole;                                                                                        \
                }                                                                                                                               \
                a += table[above];                                                                                                              \
                b += table[whole];                                                                                                              \
            }                                                                                                                                   \
            own[c] += a;                                                                                                                        \
            zero[c] += b;                                                                                                                       \
        }                                                                                                                                       \
        return beyond;                                                                                                                          \
    }

DEFINE_ADD(add_bytes, uint8_t, 0)
DEFINE_ADD(add_integers, int32_t, 1)

#define ADD(name, type, rows) name((const type *)codes + r * channels, (const type *)baseline + r * strides[0], rows, channels, strides, table, last, own, zero)

#if defined(__AVX512VBMI__)
#define WIDE 64 /* bytes of a vector */
#define SIZES 64
typedef __m512i Bytes;
static inline Bytes load(const uint8_t *from) { return _mm512_loadu_si512(from); }
static inline Bytes all_of(uint8_t value) { return _mm512_set1_epi8((char)value); }
static inline Bytes apart(Bytes a, Bytes b) { return _mm512_sub_epi8(_mm512_max_epu8(a, b), _mm512_min_epu8(a, b)); }
static inline Bytes look_up(const uint8_t *table, Bytes size) { return _mm512_permutexvar_epi8(size, load(table)); }
static inline Bytes plus(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
static inline void store(uint8_t *to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
#elif defined(__AVX2__)
#define WIDE 32
#define SIZES 32
typedef __m256i Bytes;
static inline Bytes load(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline Bytes all_of(uint8_t value) { return _mm256_set1_epi8((char)value); }
static inline Bytes apart(Bytes a, Bytes b) { return _mm256_sub_epi8(_mm256_max_epu8(a, b), _mm256_min_epu8(a, b)); }
static inline Bytes look_up(const uint8_t *table, Bytes size) {
    const Bytes low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16)));
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, size), _mm256_shuffle_epi8(high, size), _mm256_cmpgt_epi8(size, _mm256_set1_epi8(15)));
}
static inline Bytes plus(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
static inline void store(uint8_t *to, Bytes bytes) { _mm256_storeu_si256((__m256i *)to, bytes); }
#endif

#if defined(SIZES)
static uint8_t largest_of(const uint8_t *bytes, int64_t count) {
    uint8_t largest = 0;
    for (int64_t i = 0; i < count; i++) largest = bytes[i] > largest ? bytes[i] : largest;
    return largest;
}

/* Rows of WIDE channels into sums of both sizes; tables: of each field; few: rows whose sums fit a byte. `some` channels are there. */
static void add_wide(const uint8_t *q, const uint8_t *z, int64_t rows, int64_t channels, int64_t some, const int64_t strides[2], uint8_t tables[FIELDS][SIZES], int64_t few,
                     uint64_t sums[2 * FIELDS][WIDE]) {
    for (int64_t first = 0; first < rows; first += few) {
        const int64_t last = first + few < rows ? first + few : rows;
        Bytes found[2 * FIELDS];
        for (int f = 0; f < 2 * FIELDS; f++) found[f] = all_of(0);
        for (int64_t r = first; r < last; r++) {
            uint8_t room[2][WIDE] = {{0}};
            const uint8_t *code = q + r * channels, *own = z + r * strides[0];
            if (some < WIDE) {
                code = memcpy(room[0], code, (size_t)some);
                if (strides[1]) own = memcpy(room[1], own, (size_t)some);
            }
            const Bytes whole = load(code), above = apart(whole, strides[1] ? load(own) : all_of(*own));
            for (int f = 0; f < FIELDS; f++) {
                found[f] = plus(found[f], look_up(tables[f], above));
                found[FIELDS + f] = plus(found[FIELDS + f], look_up(tables[f], whole));
            }
        }
        for (int f = 0; f < 2 * FIELDS; f++) {
            uint8_t bytes[WIDE];
            store(bytes, found[f]);
            for (int i = 0; i < WIDE; i++) sums[f][i] += bytes[i];
        }
    }
}

/* The whole sums of small sizes, many channels at a time; 0 is returned where a size or what a field holds of it is too large. */
static int add_small(const uint8_t *codes, int64_t rows, int64_t channels, const uint8_t *baseline, const int64_t strides[2], const uint64_t *table, int64_t *sums) {
    const int in_rows = strides[1] == 1 || (strides[1] == 0 && strides[0] >= 0);
    if (!in_rows) return 0;
    uint8_t most = largest_of(codes, rows * channels); /* of codes and baselines, so of no difference is it less */
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t own = largest_of(baseline + r * strides[0], strides[1] ? channels : 1);
        most = own > most ? own : most;
    }
    if (most >= SIZES) return 0;
    uint8_t tables[FIELDS][SIZES];
    uint64_t largest = 1;
    for (int f = 0; f < FIELDS; f++)
        for (int size = 0; size < SIZES; size++) {
            const uint64_t one = size > most ? 0 : table[size] >> 16 * f & 0xffff;
            largest = one > largest ? one : largest;
            tables[f][size] = (uint8_t)one;
        }
    if (largest > UINT8_MAX) return 0;
    for (int64_t c = 0; c < channels; c += WIDE) {
        const int64_t some = channels - c < WIDE ? channels - c : WIDE;
        uint64_t found[2 * FIELDS][WIDE] = {{0}};
        add_wide(codes + c, baseline + c * strides[1], rows, channels, some, strides, tables, (int64_t)(UINT8_MAX / largest), found);
        for (int64_t i = 0; i < some; i++)
            for (int f = 0; f < FIELDS; f++) sums[FIELDS * (c + i) + f] = (int64_t)found[f][i], sums[FIELDS * (channels + c + i) + f] = (int64_t)found[FIELDS + f][i];
    }
    return 1;
}
#else
static int add_small(const uint8_t *codes, int64_t rows, int64_t channels, const uint8_t *baseline, const int64_t strides[2], const uint64_t *table, int64_t *sums) {
    (void)codes, (void)rows, (void)channels, (void)baseline, (void)strides, (void)table, (void)sums;
    return 0;
}
#endif

/* codes: (rows, channels), bytes or int32; baseline: z of row r and channel c at r · row_stride + c · channel_stride, of the same type; table: a word for every size, 256
   for bytes; block: rows whose fields do not overflow, at least ROWS; sums: (2, channels, FIELDS), of |q − z| and of |q|, zero at first. 1 if a size is not in the table,
   2 if there is no memory. */
int32_t spikellm_sum_by_channel(const void *codes, int64_t rows, int64_t channels, const void *baseline, int64_t row_stride, int64_t channel_stride,
                                const uint64_t *table, int64_t entries, int64_t block, int64_t *sums, int32_t bytes) {
    const int64_t strides[2] = {row_stride, channel_stride};
    if (bytes && entries >= 256 && add_small(codes, rows, channels, baseline, strides, table, sums)) return 0;
    uint64_t *const words = calloc((size_t)(2 * channels), sizeof *words);
    if (!words) return 2;
    uint64_t *const own = words, *const zero = words + channels;
    const uint32_t last = (uint32_t)(entries - 1);
    uint32_t beyond = bytes && entries < 256;
    int64_t held = 0;
    for (int64_t r = 0; r < rows && !beyond; r += ROWS) {
        const int64_t some = rows - r < ROWS ? rows - r : ROWS;
        if (bytes)
            beyond = some == ROWS ? ADD(add_bytes, uint8_t, ROWS) : ADD(add_bytes, uint8_t, some);
        else
            beyond = some == ROWS ? ADD(add_integers, int32_t, ROWS) : ADD(add_integers, int32_t, some);
        held += some;
        if (held + ROWS > block || r + ROWS >= rows) {
            spill(own, channels, sums);
            spill(zero, channels, sums + FIELDS * channels);
            held = 0;
        }
    }
    free(words);
    return (int32_t)(beyond != 0);
}
