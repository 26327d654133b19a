/* Operations of a step on one row of values: norms, rotations, rotary embedding, activation functions, residuals. */
#ifndef SPIKELLM_STEP_VALUES_H
#define SPIKELLM_STEP_VALUES_H
#include "step_attention.h"

/* data: weight, bias; a: RMS, RMS_WIDE or LAYER_NORM; x: epsilon. y may be x. */
static inline void norm_row(const Op *op, const float *x, int64_t count, int32_t type, float *y) {
    const float *weight = op->data[0], *bias = op->data[1];
    if (op->a == LAYER_NORM) {
        const Moments found = moments_of(x, count, type == FLOAT32 ? op->b : 2 * op->b, op->b);
        const float scale = 1.0f / sqrtf(found.variance + op->x);
        for (int64_t i = 0; i < count; i++) y[i] = FMA((x[i] - found.mean) * scale, weight ? weight[i] : 1.0f, bias ? bias[i] : 0.0f);
        round_to_type(y, count, type);
        return;
    }
    float squares[256], sum = 0.0f, *room = count > 256 ? malloc(sizeof(float) * (size_t)count) : squares;
    for (int64_t i = 0; room && i < count; i++) room[i] = x[i] * x[i];
    if (room) sum = sum_of_row(room, count);
    const float scale = 1.0f / sqrtf(sum / (float)count + op->x);
    for (int64_t i = 0; i < count; i++) y[i] = op->a == RMS_WIDE ? x[i] * scale * weight[i] : x[i] * scale;
    round_to_type(y, count, type);
    for (int64_t i = 0; op->a == RMS && i < count; i++) y[i] *= weight[i];
    if (op->a == RMS) round_to_type(y, count, type);
    if (room != squares) free(room);
}

/* data: signs, channels (null for all), signs between the transforms, offset; a: channels that are rotated. */
static inline void rotate_row(const Op *op, const float *x, int64_t count, int32_t type, float *y) {
    const float *signs = op->data[0], *between = op->data[2], *offset = op->data[3];
    const int32_t *channels = op->data[1];
    memcpy(y, x, sizeof(float) * (size_t)count);
    if (channels) {
        float *part = malloc(sizeof(float) * (size_t)op->a + 1);
        for (int32_t i = 0; part && i < op->a; i++) part[i] = x[channels[i]] * signs[i];
        if (part) mix_row(part, op->a, between);
        for (int32_t i = 0; part && i < op->a; i++) y[channels[i]] = part[i];
        free(part);
    } else if (op->a) {
        for (int64_t i = 0; i < count; i++) y[i] *= signs[i];
        mix_row(y, count, between);
    }
    for (int64_t i = 0; offset && i < count; i++) y[i] -= offset[i];
    round_to_type(y, count, type);
}

/* The first `count` channels of a head, in place. */
static inline void rope_row(const float *x, const float *cosine, const float *sine, int32_t count, int32_t type, float *y) {
    const int32_t half = count / 2;
    for (int32_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        float values[4] = {a * cosine[i], -b * sine[i], b * cosine[half + i], a * sine[half + i]};
        round_to_type(values, 4, type);
        float sums[2] = {values[0] + values[1], values[2] + values[3]};
        round_to_type(sums, 2, type);
        y[i] = sums[0], y[half + i] = sums[1];
    }
}

static inline void scale_row(const float *x, int64_t count, float by, int32_t type, float *y) {
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * by;
    round_to_type(y, count, type);
}

static inline void add_rows(const float *x, const float *other, int64_t count, int32_t type, float *y) {
    for (int64_t i = 0; i < count; i++) y[i] = x[i] + other[i];
    round_to_type(y, count, type);
}

/* a: which function; other: what it is multiplied with, or null. The last values of a tensor, too few for torch's vectors, take the functions of the C library there. */
static inline void activate_row(const Op *op, const float *x, const float *other, int64_t count, int64_t token, int64_t tokens, int32_t type, int32_t lanes, float *y) {
    const int64_t block = 2 * (type == FLOAT32 ? lanes : 2 * lanes), whole = op->b ? count / block * block : tokens * count / block * block - token * count;
    const int64_t vectors = whole < 0 ? 0 : whole < count ? whole : count;
    if (op->a == SILU) {
        for (int64_t i = 0; i < vectors; i++) y[i] = x[i] / (1.0f + exp_of(0.0f - x[i]));
        for (int64_t i = vectors; i < count; i++) y[i] = x[i] / (1.0f + expf(-x[i]));
    } else if (op->a == RELU) {
        for (int64_t i = 0; i < count; i++) y[i] = x[i] > 0.0f ? x[i] : 0.0f;
    } else if (op->a == GELU) {
        for (int64_t i = 0; i < vectors; i++) y[i] = x[i] * 0.5f * (1.0f + erf_of(x[i] * 0.70710678118654752440f));
        for (int64_t i = vectors; i < count; i++) y[i] = x[i] * 0.5f * (1.0f + erff(x[i] * 0.70710678118654752440f));
    } else if (op->a == GELU_TANH) {
        for (int64_t i = 0; i < count; i++) {
            const float inner = 0.79788456080286535588f * FMA(0.044715f, x[i] * x[i] * x[i], x[i]);
            y[i] = 0.5f * x[i] * (1.0f + (i < vectors ? tanh_of(inner) : tanhf(inner)));
        }
    } else {
        for (int64_t i = 0; i < count; i++) y[i] = gelu_by_steps(x[i], i < vectors, type);
    }
    round_to_type(y, count, type);
    for (int64_t i = 0; other && i < count; i++) y[i] *= other[i];
    if (other) round_to_type(y, count, type);
}

#endif
