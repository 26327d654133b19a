/* What kernels of attention need to know of a coder of heads, as one array of 32-bit words; made by head_plan.py, which says the same in Python.

   header, then for each head and stored place: channel, range, largest code, T over that of ordinary channels (a float); then for each place where its code stands once unpacked; then what price.h says.

   A row is what a cache holds of a token and head: codes of ordinary channels, of salient ones, thresholds of ranges (bfloat16), baselines (bytes). Unpacked, a section whose
   codes divide a byte stands field by field, each field as long as `stride`; other sections stand in order. */
#ifndef SPIKELLM_HEADS_H
#define SPIKELLM_HEADS_H
#include "encode.h"
#include <stdlib.h>
#include <string.h>

#define SECTIONS 2
#define RANGES 2
#define SLACK 64 /* bytes that may be read beyond a row's copy */

typedef struct { int32_t count, bits, bytes, stride, at; } Section;
typedef struct { int32_t heads, channels, ranges, mode, top, row_bytes, width, by_mean; float share; Section sections[SECTIONS]; PriceHeader price; } HeadHeader;

typedef struct {
    HeadHeader head;
    const int32_t *channel, *range, *top, *place;
    const float *fineness;
    Price price;
} HeadPlan;

/* The plan as one head sees it; a plan of one head serves all. */
static inline HeadPlan read_head_plan(const int32_t *words, int64_t head) {
    HeadPlan plan;
    plan.head = *(const HeadHeader *)words;
    words += sizeof(HeadHeader) / sizeof(int32_t);
    const int64_t channels = plan.head.channels, all = channels * plan.head.heads, own = (plan.head.heads > 1 ? head : 0) * channels;
    plan.channel = words + own;
    plan.range = words + all + own;
    plan.top = words + 2 * all + own;
    plan.fineness = (const float *)(words + 3 * all + own);
    plan.place = words + 4 * all;
    plan.price = read_price(&plan.head.price, plan.place + channels);
    return plan;
}

/* θ and z of a range as a cache keeps them: θ as the smallest bfloat16 that is not below it. */
typedef struct { float theta, baseline; } HeadThreshold;

static inline HeadThreshold head_threshold(float low, float high, int finite, const HeadHeader *head) {
    HeadThreshold found = {threshold_of(low, high, finite, head->top, head->mode).theta, head->mode == SYMMETRIC ? (float)(head->top / 2) : 0.0f};
    uint32_t bits;
    memcpy(&bits, &found.theta, sizeof bits);
    if (bits & 0xffffu) bits = (bits & 0xffff0000u) + 0x10000u;
    memcpy(&found.theta, &bits, sizeof bits);
    if (head->mode == ASYMMETRIC) {
        float units = finite ? -low / found.theta : 0.0f;
        found.baseline = units == units ? between(half_up(between(units, -FAR, FAR)), 0.0f, (float)head->top) : 0.0f;
    }
    return found;
}

/* Bits `bits` from bit `at` on; two bytes are looked at. */
static inline uint32_t code_in(const uint8_t *row, int32_t at, int32_t bits) {
    const uint32_t word = (uint32_t)row[at >> 3] | (uint32_t)row[(at >> 3) + 1] << 8;
    return word >> (at & 7) & ((1u << bits) - 1u);
}

static inline float theta_in(const uint8_t *row, const HeadHeader *head, int32_t range) {
    const uint8_t *at = row + head->sections[0].bytes + head->sections[1].bytes + 2 * range;
    const uint32_t bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24;
    float theta;
    memcpy(&theta, &bits, sizeof theta);
    return theta;
}

/* The code that stands for zero, of an ordinary channel; signed codes are stored raised by their top. */
static inline float baseline_in(const uint8_t *row, const HeadHeader *head, int32_t range) {
    return head->mode == SIGNED ? (float)head->top : (float)row[head->row_bytes - head->ranges + range];
}

/* Fineness of every place within a range, zero elsewhere: (ranges, width), which is zero before. */
static inline void place_fineness(const HeadPlan *plan, float *fineness) {
    for (int32_t i = 0; i < plan->head.channels; i++) fineness[plan->range[i] * plan->head.width + plan->place[i]] = plan->fineness[i];
}

/* Codes of a row less their baselines, `width` of them; SLACK bytes beyond the row may be read. Places that no channel has hold some finite number. */
static inline void unpack_row_of_head(const HeadHeader *head, const uint8_t *row, const float *fineness, float *codes) {
    const uint8_t *whole = row;
    for (int s = 0; s < SECTIONS; s++) {
        const Section *section = &head->sections[s];
        float *out = codes + section->at;
        if (8 % section->bits == 0) {
            const uint32_t mask = (1u << section->bits) - 1u;
            for (int32_t shift = 0; shift < 8; shift += section->bits, out += section->stride)
                for (int32_t i = 0; i < section->stride; i += LANES)
                    for (int lane = 0; lane < LANES; lane++) out[i + lane] = (float)(int32_t)((uint32_t)row[i + lane] >> shift & mask);
        } else {
            for (int32_t i = 0; i < section->count; i++) out[i] = (float)(int32_t)code_in(row, i * section->bits, section->bits);
        }
        row += section->bytes;
    }
    for (int32_t r = 0; r < head->ranges; r++, fineness += head->width) {
        const float baseline = baseline_in(whole, head, r);
        for (int32_t i = 0; i < head->width; i += LANES)
            for (int lane = 0; lane < LANES; lane++) codes[i + lane] -= baseline * fineness[i + lane];
    }
}
#endif
