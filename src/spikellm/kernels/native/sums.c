/* Sums over rows of what a table holds for the size of a code: profiling counts spikes so, all execution modes in one pass. */
#include <stdint.h>
#include <stdlib.h>

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

/* codes: (rows, channels), bytes or int32; baseline: z of row r and channel c at r · row_stride + c · channel_stride, of the same type; table: a word for every size, 256
   for bytes; block: rows whose fields do not overflow, at least ROWS; sums: (2, channels, FIELDS), of |q − z| and of |q|, zero at first. 1 if a size is not in the table,
   2 if there is no memory. */
int32_t spikellm_sum_by_channel(const void *codes, int64_t rows, int64_t channels, const void *baseline, int64_t row_stride, int64_t channel_stride,
                                const uint64_t *table, int64_t entries, int64_t block, int64_t *sums, int32_t bytes) {
    uint64_t *const words = calloc((size_t)(2 * channels), sizeof *words);
    if (!words) return 2;
    uint64_t *const own = words, *const zero = words + channels;
    const int64_t strides[2] = {row_stride, channel_stride};
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
