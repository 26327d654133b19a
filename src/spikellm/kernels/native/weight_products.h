/* Layers of weight_only.c in parts that any schedule may call. */
#ifndef SPIKELLM_WEIGHT_PRODUCTS_H
#define SPIKELLM_WEIGHT_PRODUCTS_H
#include <stdint.h>

/* A layer, its tensors as spikellm_weight_only_linear has them, and inputs of its tokens in the order of places: (tokens, buffer), zero where no column stands. */
typedef struct {
    const int32_t *plan;
    const uint8_t *packed, *zero;
    const float *scale, *bias, *placed;
    void *y;
    int64_t tokens;
    int32_t type; /* of y, see floats.h */
} WeightOnly;

typedef struct { int64_t in, out, buffer, row_bytes, strips; } WeightSizes;

WeightSizes weight_sizes(const int32_t *plan);

/* Inputs of a token into their places, zero before. */
void place_weight_inputs(const int32_t *plan, const float *x, float *placed);

/* Strips of outputs of all tokens; a Part of team.h, of a WeightOnly. Always 0. */
int32_t run_weight_strips(void *work, int64_t first, int64_t last);
#endif
