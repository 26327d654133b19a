/* The rotation of quantization/hadamard.py, a row at a time: Walsh–Hadamard transforms in the same order of additions, so the same bits.

   A stage adds to each value the one whose index differs in one bit, and subtracts the other way round: x[i ^ half] + sign·x[i]. Stages within a vector are shuffles. */
#ifndef SPIKELLM_MIX_H
#define SPIKELLM_MIX_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#define VECTOR_BYTES 64 /* of a vector; compilers split it where the processor has narrower ones */

#if defined(__clang__)
#define SHUFFLED(v, w, T, half) __builtin_shufflevector(v, v, INDICES_##w(half))
#else
#define SHUFFLED(v, w, T, half) __builtin_shuffle(v, (T){INDICES_##w(half)})
#endif
#define INDICES_8(h) 0 ^ h, 1 ^ h, 2 ^ h, 3 ^ h, 4 ^ h, 5 ^ h, 6 ^ h, 7 ^ h
#define INDICES_16(h) INDICES_8(h), 8 ^ h, 9 ^ h, 10 ^ h, 11 ^ h, 12 ^ h, 13 ^ h, 14 ^ h, 15 ^ h
#define SIGN(i, h) ((i) & (h) ? -1 : 1)
#define SIGNS_8(h) SIGN(0, h), SIGN(1, h), SIGN(2, h), SIGN(3, h), SIGN(4, h), SIGN(5, h), SIGN(6, h), SIGN(7, h)
#define SIGNS_16(h) SIGNS_8(h), SIGN(8, h), SIGN(9, h), SIGN(10, h), SIGN(11, h), SIGN(12, h), SIGN(13, h), SIGN(14, h), SIGN(15, h)
#define STAGE(real, index, w, half) v = SHUFFLED(v, w, index, half) + v * (real){SIGNS_##w(half)}

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t FloatIndex __attribute__((vector_size(VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t DoubleIndex __attribute__((vector_size(VECTOR_BYTES)));

/* Stages of a whole row of a power of two, in place; `first` are those within a vector. */
#define DEFINE_WALSH(name, real, vector, lanes, first)                                                              \
    static inline void name(real *row, int64_t size) {                                                                     \
        int64_t half = 1;                                                                                           \
        if (size >= lanes) {                                                                                        \
            for (int64_t start = 0; start < size; start += lanes) {                                                 \
                vector v;                                                                                           \
                memcpy(&v, row + start, sizeof v);                                                                  \
                first;                                                                                              \
                memcpy(row + start, &v, sizeof v);                                                                  \
            }                                                                                                       \
            half = lanes;                                                                                           \
        }                                                                                                           \
        for (; half < size; half *= 2)                                                                              \
            for (int64_t start = 0; start < size; start += 2 * half) {                                              \
                real *restrict low = row + start, *restrict high = row + start + half;                              \
                for (int64_t i = 0; i < half; i++) {                                                                \
                    const real a = low[i], b = high[i];                                                             \
                    low[i] = a + b;                                                                                 \
                    high[i] = a - b;                                                                                \
                }                                                                                                   \
            }                                                                                                       \
    }

DEFINE_WALSH(walsh_float, float, Floats, 16,
             STAGE(Floats, FloatIndex, 16, 1); STAGE(Floats, FloatIndex, 16, 2); STAGE(Floats, FloatIndex, 16, 4); STAGE(Floats, FloatIndex, 16, 8))
DEFINE_WALSH(walsh_double, double, Doubles, 8, STAGE(Doubles, DoubleIndex, 8, 1); STAGE(Doubles, DoubleIndex, 8, 2); STAGE(Doubles, DoubleIndex, 8, 4))

/* A whole row, in place; power: of two, the largest within the size, and scale its root; signs: (power,), before the second transform, which only a size that is no power of
   two needs. */
#define DEFINE_MIX_ROW(name, real, walsh)                                                                  \
    static inline void name(real *row, int64_t size, int64_t power, real scale, const float *signs) {      \
        walsh(row, power);                                                                                 \
        for (int64_t i = 0; i < power; i++) row[i] /= scale;                                               \
        if (power == size) return;                                                                         \
        real *last = row + (size - power);                                                                 \
        for (int64_t i = 0; i < power; i++) last[i] *= (real)signs[i];                                     \
        walsh(last, power);                                                                                \
        for (int64_t i = 0; i < power; i++) last[i] /= scale;                                              \
    }

DEFINE_MIX_ROW(mix_floats, float, walsh_float)
DEFINE_MIX_ROW(mix_doubles, double, walsh_double)

static inline void mix_row(float *row, int64_t size, const float *signs) {
    int64_t power = 1;
    while (2 * power <= size) power *= 2;
    mix_floats(row, size, power, (float)sqrt((double)power), signs);
}
#endif
