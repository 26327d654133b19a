/* Rounding that weighs loss against spikes: neurons/price.py. Every float operation is the one there.

   Words of a plan: decisions (floats) where the next larger count is taken; the counts between them, one more; for every whole number of thresholds up to `reach`, how many
   decisions lie below it. Without decisions a magnitude loses `inhibition` thresholds, none where spikes have no price. */
#ifndef SPIKELLM_PRICE_H
#define SPIKELLM_PRICE_H
#include <math.h>
#include <stdint.h>

typedef struct { float inhibition; int32_t edges, reach; } PriceHeader;
typedef struct { float inhibition; int32_t edges, reach, any; const float *edge; const int32_t *count, *first; } Price;

static inline Price read_price(const PriceHeader *head, const int32_t *words) {
    Price price = {head->inhibition, head->edges, head->reach, head->edges > 0 || head->inhibition > 0.0f, (const float *)words, words + head->edges, words + 2 * head->edges + 1};
    return price;
}

/* A current in thresholds as it is counted. Ties of negative values go towards zero, or away from it where `away`. */
static inline float worth(const Price *price, float units, int away) {
    float size = fabsf(units);
    if (price->edges == 0) {
        size -= price->inhibition;
        return copysignf(size > 0.0f ? size : 0.0f, units);
    }
    int32_t at = price->edges;
    if (size < (float)price->reach) {
        const int reaches = units >= 0.0f || away;
        for (at = price->first[(int32_t)size]; at < price->edges && (reaches ? size >= price->edge[at] : size > price->edge[at]); at++) {}
    }
    return copysignf((float)price->count[at], units);
}

#define BLOCK 64
#define FEW 48 /* decisions that are compared one by one, in all values at once, faster than the table is walked */

/* The same for BLOCK currents at once, in place. */
static inline void worth_of_block(const Price *price, float *units, int away) {
    if (price->edges == 0 || price->edges > FEW) {
        for (int i = 0; i < BLOCK; i++) units[i] = worth(price, units[i], away);
        return;
    }
    float counts[BLOCK] = {0};
    for (int32_t e = 0; e < price->edges; e++) {
        const float edge = price->edge[e], rise = (float)(price->count[e + 1] - price->count[e]);
        if (away)
            for (int i = 0; i < BLOCK; i++) counts[i] += (units[i] >= edge ? rise : 0.0f) - (units[i] <= -edge ? rise : 0.0f);
        else
            for (int i = 0; i < BLOCK; i++) counts[i] += (units[i] >= edge ? rise : 0.0f) - (units[i] < -edge ? rise : 0.0f);
    }
    for (int i = 0; i < BLOCK; i++) units[i] = counts[i];
}
#endif
