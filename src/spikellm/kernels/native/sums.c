/* Sums over rows of what a table holds for the size of a code: profiling counts spikes so, all execution modes in one pass. */
#include <stdint.h>
#include <stdlib.h>

#define FIELDS 4 /* of 16 bits, in a word of the table */

static void spill(uint64_t *words, int64_t channels, int64_t *sums) {
    for (int64_t c = 0; c < channels; c++) {
        for (int f = 0; f < FIELDS; f++) sums[FIELDS * c + f] += (int64_t)(words[c] >> 16 * f & 0xffff);
        words[c] = 0;
    }
}

/* codes: (rows, channels); baseline: z of row r and channel c at r · row_stride + c · channel_stride; table: a word for every size; block: rows whose fields do not
   overflow; sums: (2, channels, FIELDS), of |q − z| and of |q|, zero at first. 1 if a size is not in the table, 2 if there is no memory. */
int32_t spikellm_sum_by_channel(const int32_t *codes, int64_t rows, int64_t channels, const int32_t *baseline, int64_t row_stride, int64_t channel_stride,
                                const uint64_t *table, int64_t sizes, int64_t block, int64_t *sums) {
    uint64_t *const words = calloc((size_t)(2 * channels), sizeof *words);
    if (!words) return 2;
    uint64_t *restrict own = words, *restrict zero = words + channels;
    uint32_t beyond = 0;
    const uint32_t last = (uint32_t)(sizes - 1);
    for (int64_t r = 0; r < rows; r++) {
        const int32_t *restrict q = codes + r * channels, *restrict z = baseline + r * row_stride;
        for (int64_t c = 0; c < channels; c++) {
            const int32_t difference = q[c] - z[c * channel_stride];
            const uint32_t a = (uint32_t)(difference < 0 ? -difference : difference), b = (uint32_t)(q[c] < 0 ? -q[c] : q[c]);
            beyond |= (a > last) | (b > last);
            own[c] += table[a > last ? last : a];
            zero[c] += table[b > last ? last : b];
        }
        if ((r + 1) % block == 0 || r + 1 == rows) {
            spill(own, channels, sums);
            spill(zero, channels, sums + FIELDS * channels);
        }
    }
    free(words);
    return (int32_t)(beyond != 0);
}
