/* Sleef's tanhf within 1.0 ulp, which torch takes for tanh of vectors: numbers of two floats, whose sum is the value. */
#ifndef SPIKELLM_TANH_H
#define SPIKELLM_TANH_H
#include "encode.h"

#define FMA(a, b, c) __builtin_fmaf(a, b, c)

static inline float power_of_two(int32_t exponent) {
    const int32_t bits = (int32_t)((uint32_t)(exponent + 127) << 23);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

typedef struct { float high, low; } Pair;

static inline Pair pair_plus(Pair x, Pair y) {
    const float sum = x.high + y.high;
    return (Pair){sum, x.high - sum + y.high + x.low + y.low};
}

/* The same whichever is larger. */
static inline Pair pair_plus_any(Pair x, Pair y) {
    const float sum = x.high + y.high, own = sum - x.high;
    return (Pair){sum, (x.high - (sum - own)) + (y.high - own) + (x.low + y.low)};
}

static inline Pair pair_times(Pair x, Pair y) {
    const float product = x.high * y.high;
    return (Pair){product, FMA(x.high, y.low, FMA(x.low, y.high, FMA(x.high, y.high, -product)))};
}

static inline Pair pair_over(Pair x, Pair y) {
    const float inverse = 1.0f / y.high, quotient = x.high * inverse, rest = FMA(inverse, x.high, -quotient);
    const float wrong = FMA(-y.low, inverse, FMA(-y.high, inverse, 1.0f));
    return (Pair){quotient, FMA(quotient, wrong, FMA(x.low, inverse, rest))};
}

/* exp of a magnitude up to 20. */
static inline Pair pair_exp(float x) {
    const float q = nearest(x * 1.442695040888963407359924681001892137426645954152985934135449406931f);
    Pair s = pair_plus_any((Pair){x, 0.0f}, (Pair){q * -0.693145751953125f, 0.0f});
    s = pair_plus_any(s, (Pair){q * -1.428606765330187045e-06f, 0.0f});
    float u = 0.1980960224e-3f;
    u = FMA(u, s.high, 0.1394256484e-2f);
    u = FMA(u, s.high, 0.8333456703e-2f);
    u = FMA(u, s.high, 0.4166637361e-1f);
    const float product = s.high * u;
    Pair t = {product, FMA(s.low, u, FMA(s.high, u, -product))};
    t = pair_plus_any(t, (Pair){0.166666659414234244790680580464f, 0.0f});
    t = pair_plus_any(pair_times(s, t), (Pair){0.5f, 0.0f});
    const float square = s.high * s.high;
    t = pair_plus_any(s, pair_times((Pair){square, FMA(s.high + s.high, s.low, FMA(s.high, s.high, -square))}, t));
    const float sum = 1.0f + t.high, scale = power_of_two((int32_t)q);
    return (Pair){sum * scale, ((1.0f - sum) + t.high + t.low) * scale};
}

static inline float tanh_of(float x) {
    const float size = between(fabsf(x), 0.0f, 20.0f);
    const Pair up = pair_exp(size);
    const float inverse = 1.0f / up.high;
    const Pair down = {inverse, inverse * FMA(-up.low, inverse, FMA(-up.high, inverse, 1.0f))};
    const Pair found = pair_over(pair_plus(up, (Pair){-down.high, -down.low}), pair_plus(up, down));
    const float value = size > 8.664339742f ? 1.0f : found.high + found.low;
    return x == x ? copysignf(value, x) : x;
}
#endif
