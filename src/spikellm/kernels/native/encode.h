/* Spike counts of one token: ranges, thresholds, baselines, rounding and placing in one go. Every float operation is the one of neurons/base.py and
   quantization/thresholds.py, in the same order, so that θ, z and counts have the same bits. */
#ifndef SPIKELLM_ENCODE_H
#define SPIKELLM_ENCODE_H
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#include "plan.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define LANES 16
#define FAR 1e5f /* beyond every code; keeps the rounding below exact */

/* Nearest integer, ties to even, for |v| < 2**22; beyond, some number as large. */
static inline float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

/* floor(v + 1/2) without the rounding of that sum. */
static inline float half_up(float v) {
    float n = nearest(v);
    return n + (v - n == 0.5f ? 1.0f : 0.0f);
}

static inline float between(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* Smallest and largest value of x, zero included; 0 is returned where one is not finite. */
static inline int range_of(const float *x, int32_t count, float *low, float *high) {
    float least = 0.0f, most = 0.0f, zeros = 0.0f; /* NaN where a value is not finite */
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : zeros)
    for (int32_t i = 0; i < count; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        zeros += x[i] * 0.0f;
    }
    *low = least, *high = most;
    return zeros == 0.0f;
}

/* Mean magnitude of x, whose largest is given, over `among` channels; in whole parts of the largest, so that the order does not matter. */
static inline float mean_of(const float *x, int32_t count, int32_t among, float largest) {
    int64_t total = 0;
    if (largest == 0.0f) return 0.0f;
    for (int32_t i = 0; i < count; i++) total += (int32_t)(fabsf(x[i]) / largest * 16777216.0f);
    return (float)((double)largest * ((double)total / 16777216.0 / (double)among));
}

/* The range in which x is coded: a share of it, or a multiple of the mean magnitude of `among` channels. 0 is returned where x is not finite. */
static inline int coded_range(const float *x, int32_t count, float share, int32_t by_mean, int32_t among, float *low, float *high) {
    const int finite = range_of(x, count, low, high);
    if (by_mean && finite) {
        const float reach = mean_of(x, count, among, *high > -*low ? *high : -*low) * share;
        *high = reach > FLT_MAX ? FLT_MAX : reach;
        *low = -*high;
    } else if (share != 1.0f) {
        *low *= share, *high *= share;
    }
    return finite;
}

typedef struct { float theta; int32_t baseline; } Threshold;

static inline Threshold threshold_of(float low, float high, int finite, int32_t top, int32_t mode) {
    Threshold found = {NAN, mode == SYMMETRIC ? top / 2 : mode == SIGNED ? top : 0};
    if (!finite) return found;
    float theta;
    if (mode == ASYMMETRIC) {
        theta = high / (float)top - low / (float)top;
        float units = -low / theta;
        if (units == units && units <= FLT_MAX) { /* 0/0 where all is zero; an infinite quotient counts as none, as nan_to_num says */
            float z = half_up(units > FAR ? FAR : units);
            found.baseline = (int32_t)(z > (float)top ? (float)top : z);
        }
    } else {
        float reach = high > -low ? high : -low;
        theta = reach / (float)(mode == SIGNED ? top : top / 2);
    }
    if (theta < FLT_MIN) theta = 1.0f;
    found.theta = theta <= FLT_MAX ? theta : NAN;
    return found;
}

/* Whether all of x are finite. */
static inline int all_finite(const float *x, int32_t count) {
    float zeros = 0.0f;
#pragma omp simd reduction(+ : zeros)
    for (int32_t i = 0; i < count; i++) zeros += x[i] * 0.0f;
    return zeros == 0.0f;
}

/* Whether a token takes the steps of massive ones: quantization/massive_tokens.py. */
static inline int is_massive(const Header *head, const float *ordered) {
    float low, high;
    if (head->massive_top == 0 || !range_of(ordered, head->in, &low, &high)) return 0;
    const float width = high - low;
    return width > head->massive_beyond && width <= FLT_MAX;
}

/* Codes of a group whose spikes have a price; apart, so that the loops without one stay short. `baseline` is by how much signed counts are raised. */
static void code_priced(const Plan *plan, Group group, const float *ordered, float theta, float baseline, uint8_t *codes) {
    const int is_signed = plan->head.mode == SIGNED;
    const float top = (float)group.top, low = is_signed ? baseline - top : 0.0f, high = is_signed ? baseline + top : top;
    for (int32_t start = group.start; start < group.stop; start += BLOCK) {
        const int32_t some = group.stop - start < BLOCK ? group.stop - start : BLOCK;
        float units[BLOCK] = {0};
        for (int32_t i = 0; i < some; i++) {
            const float value = ordered[start + i] / theta;
            units[i] = value == value ? value : 0.0f;
        }
        worth_of_block(&plan->price, units, is_signed);
        for (int32_t i = 0; i < some; i++) {
            const float size = half_up(between(is_signed ? fabsf(units[i]) : units[i], -FAR, FAR));
            codes[start + i] = (uint8_t)(int32_t)between((is_signed && units[i] < 0.0f ? -size : size) + baseline, low, high);
        }
    }
}

/* Values of a token in stored order: where they are, or gathered into `room`. */
static inline const float *in_order(const Plan *plan, const float *x, float *room) {
    const int32_t in = plan->head.in, *source = plan->source;
    int32_t moved = 0;
    for (int32_t i = 0; i < in; i++) moved |= source[i] ^ i;
    if (!moved) return x;
    int32_t i = 0;
#if defined(__AVX512F__)
    for (; i + LANES <= in; i += LANES) _mm512_storeu_ps(room + i, _mm512_i32gather_ps(_mm512_loadu_si512(source + i), x, sizeof(float)));
#endif
    for (; i < in; i++) room[i] = x[source[i]];
    return room;
}

/* Codes of a token and the thresholds of its groups. `ordered`: its values in stored order; `shares` are the parts of ranges that groups code, those of the plan where it is null.
   Signed counts are raised by their group's top, or by that of massive tokens where there are any, as if that were a baseline. */
static inline void code_token(const Plan *plan, const float *ordered, const float *shares, uint8_t *codes, Threshold *thresholds) {
    const Header *head = &plan->head;
    const int massive = is_massive(head, ordered), lost = head->fixed && !all_finite(ordered, head->in);
    for (int32_t a = 0; a < head->groups; a++) {
        Group group = plan->groups[a];
        const int32_t raised = head->massive_top ? head->massive_top : group.top;
        if (massive) group.top = head->massive_top;
        const float top = (float)group.top;
        if (head->fixed) {
            thresholds[a] = (Threshold){lost ? NAN : group.theta, group.baseline};
        } else {
            const Range range = plan->ranges[group.range];
            float low, high;
            const float share = shares ? shares[a] : group.share;
            const int32_t count = range.stop - range.start;
            const int finite = coded_range(ordered + range.start, count, share, head->by_mean, count, &low, &high);
            thresholds[a] = threshold_of(low, high, finite, group.top, head->mode);
        }
        const Threshold threshold = thresholds[a];
        if (head->mode == SIGNED) thresholds[a].baseline = raised;
        float theta = threshold.theta, baseline = (float)threshold.baseline;
        if (plan->price.any) {
            code_priced(plan, group, ordered, theta, (float)thresholds[a].baseline, codes);
        } else if (theta != theta) { /* nor is any output finite then */
            memset(codes + group.start, (int32_t)between((float)thresholds[a].baseline, 0.0f, head->mode == SIGNED ? 255.0f : top), (size_t)(group.stop - group.start));
        } else if (head->mode == SIGNED) {
            for (int32_t i = group.start; i < group.stop; i++) {
                const float units = ordered[i] / theta, size = half_up(fabsf(units));
                codes[i] = (uint8_t)(int32_t)((units < 0.0f ? -1.0f : 1.0f) * (size > top ? top : size) + (float)raised);
            }
        } else {
            for (int32_t i = group.start; i < group.stop; i++) codes[i] = (uint8_t)(int32_t)between(half_up(ordered[i] / theta) + baseline, 0.0f, top);
        }
    }
}

/* Spikes of a segment where plan.h says: whole blocks field by field, what is left of others one by one. */
static inline void place_segment(const Plan *plan, const Segment *part, const uint8_t *codes, uint8_t *spikes) {
    const int32_t block = plan->head.block, fields = block / 64;
    uint8_t *out = spikes + part->offset;
    for (int32_t b = 0; b < part->blocks; b++, out += block) {
        const int32_t first = (part->first_block + b) * block, last = first + block;
        const uint8_t *own = codes + first;
        if (first < part->start || last > part->stop) {
            for (int32_t i = first > part->start ? first : part->start; i < (last < part->stop ? last : part->stop); i++) spikes[plan->place[i]] = codes[i];
        } else if (fields == 1) {
            memcpy(out, own, 64);
        } else if (fields == 2) {
            for (int i = 0; i < 64; i++) out[i] = own[2 * i], out[64 + i] = own[2 * i + 1];
        } else { /* four */
            for (int i = 0; i < 64; i++) out[i] = own[4 * i], out[64 + i] = own[4 * i + 1], out[128 + i] = own[4 * i + 2], out[192 + i] = own[4 * i + 3];
        }
    }
}

/* Codes a token and places its spikes. `spikes` is zero where no column stands, and stays so; sums of spike counts go to `totals`, one a segment. */
static inline void encode_token(const Plan *plan, const float *x, float *room, uint8_t *codes, uint8_t *spikes, Threshold *thresholds, int32_t *totals) {
    const Header *head = &plan->head;
    code_token(plan, in_order(plan, x, room), NULL, codes, thresholds);
    for (int32_t s = 0; s < head->segments; s++) place_segment(plan, &plan->segments[s], codes, spikes);
    for (int32_t s = 0; s < head->segments; s++) {
        int32_t total = 0;
        for (int32_t i = plan->segments[s].start; i < plan->segments[s].stop; i++) total += codes[i];
        totals[s] = total;
    }
}
#endif
