/* Inputs and outputs of linear layers: float32, or bfloat16 that is widened on the way in and rounded to nearest, ties to even, on the way out, as torch does. */
#ifndef SPIKELLM_FLOATS_H
#define SPIKELLM_FLOATS_H
#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Row n of x, as floats: where it is, or widened into `room`. */
static inline const float *load_row(const void *x, int32_t type, int64_t n, int64_t length, float *room) {
    if (type == FLOAT32) return (const float *)x + n * length;
    const uint16_t *row = (const uint16_t *)x + n * length;
    for (int64_t i = 0; i < length; i++) {
        const uint32_t bits = (uint32_t)row[i] << 16;
        memcpy(room + i, &bits, sizeof bits);
    }
    return room;
}

/* Values into y from element `at` on. */
static inline void store_row(void *y, int32_t type, int64_t at, const float *values, int64_t count) {
    if (type == FLOAT32) {
        memcpy((float *)y + at, values, sizeof(float) * (size_t)count);
        return;
    }
    uint16_t *out = (uint16_t *)y + at;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        out[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}
#endif
