/* Elementary functions and sums of float32 with the operations of torch's kernels for vector processors, in their order, so that results have the same bits. Where torch was
   built for another processor they agree to rounding. */
#ifndef SPIKELLM_AS_TORCH_H
#define SPIKELLM_AS_TORCH_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "tanh.h"

#define SUMMED 8 /* lanes in which torch sums a row, on every processor */

/* Sleef's expf within 1.0 ulp, which torch takes for exp of vectors. */
static inline float exp_of(float x) {
    const float scaled = between(x * 1.442695040888963407359924681001892137426645954152985934135449406931f, -FAR, FAR);
    const float q = nearest(scaled);
    float s = FMA(q, -0.693145751953125f, x);
    s = FMA(q, -1.428606765330187045e-06f, s);
    float u = 0.000198527617612853646278381f;
    u = FMA(u, s, 0.00139304355252534151077271f);
    u = FMA(u, s, 0.00833336077630519866943359f);
    u = FMA(u, s, 0.0416664853692054748535156f);
    u = FMA(u, s, 0.166666671633720397949219f);
    u = FMA(u, s, 0.5f);
    u = 1.0f + FMA(s * s, u, s);
    const int32_t whole = (int32_t)between(q, -252.0f, 252.0f), half = whole >> 1;
    u = u * power_of_two(half) * power_of_two(whole - half);
    u = x < -104.0f ? 0.0f : u;
    return x > 100.0f ? INFINITY : u;
}

/* torch's faster exp, within 20 ulp. */
static inline float fast_exp_of(float x) {
    const float low = -0x1.5d58ap+6f, high = 0x1.62e43p+6f; /* logarithms of the smallest and of the largest number */
    float v = x < high ? x : high;
    v = v > low ? v : low;
    const float whole = floorf(FMA(v, 0x1.715476p+0f, 0.5f)), r = FMA(-whole, 0x1.62e43p-1f, v);
    float p = FMA(r, 0.00828929059f, 0.0418978221f);
    p = FMA(r, p, 0.166676521f);
    p = FMA(r, p, 0.499991506f);
    p = FMA(r, p, 0.999999701f);
    p = FMA(r, p, 1.0f);
    p = p * power_of_two((int32_t)(whole - 1.0f)) * 2.0f;
    return x < low ? 0.0f : p;
}

/* Sums of four interleaved rows of `lanes` numbers, `size` steps of 4 · lanes each: four levels of partial sums. */
static inline void sum_four(const float *x, int64_t size, int64_t lanes, float *found) {
    int64_t log = 0, power = 4;
    while ((int64_t)1 << log < size) log++;
    if (log / 4 > power) power = log / 4;
    const int64_t step = (int64_t)1 << power, width = 4 * lanes;
    float sums[4][4 * SUMMED] = {{0.0f}};
    int64_t i = 0;
    while (i + step <= size) {
        for (int64_t j = 0; j < step; j++, i++)
            for (int64_t k = 0; k < width; k++) sums[0][k] += x[i * width + k];
        for (int64_t level = 1; level < 4; level++) {
            for (int64_t k = 0; k < width; k++) {
                sums[level][k] += sums[level - 1][k];
                sums[level - 1][k] = 0.0f;
            }
            if (i & (step - 1) << (level * power)) break;
        }
    }
    for (; i < size; i++)
        for (int64_t k = 0; k < width; k++) sums[0][k] += x[i * width + k];
    for (int64_t level = 1; level < 4; level++)
        for (int64_t k = 0; k < width; k++) sums[0][k] += sums[level][k];
    memcpy(found, sums[0], sizeof(float) * (size_t)width);
}

/* The sum of a contiguous row. */
static inline float sum_of_row(const float *x, int64_t count) {
    const int64_t lanes = count < SUMMED ? 1 : SUMMED, vectors = count / lanes, four = vectors / 4;
    float sums[4 * SUMMED];
    sum_four(x, four, lanes, sums);
    for (int64_t i = four * 4; i < vectors; i++)
        for (int64_t k = 0; k < lanes; k++) sums[k] += x[i * lanes + k];
    for (int64_t part = 1; part < 4; part++)
        for (int64_t k = 0; k < lanes; k++) sums[k] += sums[part * lanes + k];
    float sum = 0.0f;
    for (int64_t i = vectors * lanes; i < count; i++) sum += x[i];
    for (int64_t k = 0; k < lanes; k++) sum += sums[k];
    return sum;
}

/* A sum in lanes of a vector that are folded in halves at the end: how torch sums the terms of a softmax. */
static inline float folded_sum(const float *x, int64_t count, int64_t lanes) {
    float sums[16];
    if (count < lanes) { /* one after the other */
        float sum = x[0];
        for (int64_t i = 1; i < count; i++) sum += x[i];
        return sum;
    }
    memcpy(sums, x, sizeof(float) * (size_t)lanes);
    int64_t i = lanes;
    for (; i + lanes <= count; i += lanes)
        for (int64_t k = 0; k < lanes; k++) sums[k] += x[i + k];
    for (int64_t k = 0; i + k < count; k++) sums[k] += x[i + k];
    for (int64_t half = lanes / 2; half; half /= 2)
        for (int64_t k = 0; k < half; k++) sums[k] += sums[k + half];
    return sums[0];
}

static inline float largest_of(const float *x, int64_t count) {
    float lanes[LANES], found;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    for (found = -INFINITY; i < count; i++) found = x[i] > found ? x[i] : found;
    for (int lane = 0; lane < LANES; lane++) found = lanes[lane] > found ? lanes[lane] : found;
    return found;
}

/* Softmax of a row, in place; lanes: of torch's vectors. */
static inline void softmax_of(float *x, int64_t count, int64_t lanes) {
    const float most = largest_of(x, count);
    for (int64_t i = 0; i < count; i++) x[i] = exp_of(x[i] - most);
    const float scale = 1.0f / folded_sum(x, count, lanes);
    for (int64_t i = 0; i < count; i++) x[i] *= scale;
}
/* erf as torch's vectors compute it (Abramowitz and Stegun 7.1.26). */
static inline float erf_of(float x) {
    const float t = 1.0f / FMA(0.3275911f, fabsf(x), 1.0f);
    float r = FMA(1.061405429f, t, -1.453152027f);
    r = FMA(r, t, 1.421413741f);
    r = FMA(r, t, -0.284496736f);
    r = FMA(r, t, 0.254829592f);
    return copysignf(FMA(-exp_of(-(x * x)) * t, r, 1.0f), x);
}

static inline float rounded(float x, int32_t type) {
    if (type == 0) return x;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

/* 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), every operator rounded. */
static inline float gelu_by_steps(float x, int in_vector, int32_t type) {
    const float cube = rounded(0.044715f * rounded(rounded(x * x, type) * x, type), type);
    const float inner = rounded(0.79788456080286535588f * rounded(x + cube, type), type);
    const float outer = rounded(1.0f + rounded(in_vector ? tanh_of(inner) : tanhf(inner), type), type);
    return rounded(x * 0.5f, type) * outer;
}

typedef struct { float mean, variance; } Moments;

static inline void add_moments(int64_t m0, float m1, float m2, int64_t *n0, float *n1, float *n2) {
    const int64_t n = *n0 + m0;
    const float c = n == 0 ? 0.0f : (float)m0 / (float)n, delta = m1 - *n1;
    *n1 = FMA(c, delta, *n1);
    *n2 += FMA(delta * delta * c, (float)*n0, m2);
    *n0 = n;
}

typedef struct { int64_t count; float mean[LANES], squares[LANES]; } Partial;

static inline void add_partial(const Partial *more, int64_t lanes, Partial *to) {
    const int64_t n = to->count + more->count;
    const float c = n == 0 ? 0.0f : (float)more->count / (float)n, own = (float)to->count;
    for (int64_t k = 0; k < lanes; k++) {
        const float delta = more->mean[k] - to->mean[k], part = c * delta;
        to->mean[k] += part;
        to->squares[k] = FMA(delta * own, part, to->squares[k] + more->squares[k]);
    }
    to->count = n;
}

/* Mean and variance of a row as torch finds them for a layer norm: Welford's sums in lanes, of CHUNK vectors each, added up pairwise. `loaded` numbers are read at a time, once
   or twice as many as there are lanes. */
#define CHUNK 16
#define DEPTH 24
static inline Moments moments_of(const float *x, int64_t count, int64_t loaded, int64_t lanes) {
    const int64_t vectors = count / loaded, chunks = (vectors + CHUNK - 1) / CHUNK;
    int64_t depth = 0;
    while ((int64_t)1 << depth < chunks) depth++;
    Partial stack[DEPTH];
    memset(stack, 0, sizeof(Partial) * (size_t)(depth > 1 ? depth : 1));
    for (int64_t i = 0; i < chunks; i++) {
        const int64_t some = vectors - i * CHUNK < CHUNK ? vectors - i * CHUNK : CHUNK;
        for (int64_t part = 0; part < loaded / lanes; part++) {
            Partial own = {some, {0.0f}, {0.0f}};
            for (int64_t j = 0; j < some; j++) {
                const float *row = x + (i * CHUNK + j) * loaded + part * lanes, c = 1.0f / (float)(j + 1);
                for (int64_t k = 0; k < lanes; k++) {
                    const float delta = row[k] - own.mean[k];
                    own.mean[k] = FMA(c, delta, own.mean[k]);
                    own.squares[k] = FMA(delta, row[k] - own.mean[k], own.squares[k]);
                }
            }
            add_partial(&own, lanes, &stack[0]);
        }
        for (int64_t j = 1, mask = i + 1; j < depth && (mask & 1) == 0; j++, mask >>= 1) {
            add_partial(&stack[j - 1], lanes, &stack[j]);
            memset(&stack[j - 1], 0, sizeof(Partial));
        }
    }
    for (int64_t i = 1; i < depth; i++) add_partial(&stack[i], lanes, &stack[0]);
    int64_t n = 0;
    float mean = 0.0f, squares = 0.0f;
    for (int64_t i = vectors * loaded; i < count; i++) {
        const float delta = x[i] - mean;
        mean += delta / (float)++n;
        squares += delta * (x[i] - mean);
    }
    for (int64_t k = 0; k < lanes; k++) add_moments(vectors * loaded / lanes, stack[0].mean[k], stack[0].squares[k], &n, &mean, &squares);
    return (Moments){mean, squares / (float)count};
}
#endif
