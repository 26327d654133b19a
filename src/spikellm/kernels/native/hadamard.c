/* The rotation of quantization/hadamard.py, every row in one pass. See mix.h. */
#include <stdlib.h>
#include "floats.h"
#include "mix.h"

/* Every row of x, (rows, size), times `first`, rotated, less `offset` where it is not null: y, which may be x. type: of both, see floats.h; the others: see below. Returns 0, or 1
   where memory ran out. */
int32_t spikellm_rotate(const void *x, int64_t rows, int64_t size, int64_t power, double root, const float *signs, const float *first, const float *offset, void *y, int32_t type,
                        int32_t threads) {
    int32_t failed = 0;
    if (rows * size < 1 << 16) threads = 1; /* a thread costs more than that */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *row = malloc(sizeof(float) * 2 * (size_t)(size + 1));
        if (!row) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) {
            if (!row) continue;
            const float *given = load_row(x, type, n, size, row + size + 1);
            for (int64_t i = 0; i < size; i++) row[i] = given[i] * first[i];
            mix_floats(row, size, power, (float)root, signs);
            for (int64_t i = 0; offset && i < size; i++) row[i] -= offset[i];
            store_row(y, type, n * size, row, size);
        }
        free(row);
    }
    return failed;
}

/* x, y: (rows, size), which may be the same; power, root, signs: see mix.h. */
#define DEFINE_MIX(name, real, mix)                                                                                                  \
    void name(const real *x, int64_t rows, int64_t size, int64_t power, double root, const float *signs, real *y, int32_t threads) { \
        if (rows * size < 1 << 16) threads = 1; /* a thread costs more than that */                                                  \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t n = 0; n < rows; n++) {                       \
            real *row = y + n * size;                                                                                                \
            if (row != x + n * size) memcpy(row, x + n * size, sizeof(real) * (size_t)size);                                         \
            mix(row, size, power, (real)root, signs);                                                                                \
        }                                                                                                                            \
    }

DEFINE_MIX(spikellm_mix, float, mix_floats)
DEFINE_MIX(spikellm_mix_double, double, mix_doubles)
