/* The rotation of quantization/hadamard.py, every row in one pass. See mix.h. */
#include "mix.h"

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
