/* Walsh–Hadamard transform of every row, in place.   x: (rows, size), size a power of two; not normalised, in the order of quantization/hadamard.py. */
#include <stdint.h>

void spikellm_walsh(float *x, int64_t rows, int64_t size, int32_t threads) {
    if (rows * size < 1 << 16) threads = 1; /* a thread costs more than that */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; n++) {
        float *row = x + n * size;
        for (int64_t half = 1; half < size; half *= 2)
            for (int64_t start = 0; start < size; start += 2 * half)
                for (float *first = row + start, *second = first + half; first < row + start + half; first++, second++) {
                    const float a = *first, b = *second;
                    *first = a + b;
                    *second = a - b;
                }
    }
}
