/* Work on one head that any schedule may call: coding a token into a row, products of queries with rows of keys, sums of rows of values. The rows of a head stand one behind
   the other; they are never unpacked as a whole. */
#ifndef SPIKELLM_ROWS_H
#define SPIKELLM_ROWS_H
#include "heads.h"

/* θ and z of a channel, from those of the two ranges. */
static inline HeadThreshold channel_threshold(const HeadPlan *plan, const HeadThreshold *found, int32_t i) {
    HeadThreshold own = found[0];
    if (plan->head.ranges > 1) {
        const float first = plan->range[i] == 0 ? 1.0f : 0.0f, second = 1.0f - first;
        own.theta = found[0].theta * first + found[1].theta * second;
        own.baseline = found[0].baseline * first + found[1].baseline * second;
    }
    return (HeadThreshold){own.theta / plan->fineness[i], own.baseline * plan->fineness[i]};
}

/* Codes as they are stored into `codes`, which holds values in units of θ, and what they stand for. */
static inline void raised_codes(const HeadPlan *plan, const HeadThreshold *found, float *values, float *codes) {
    for (int32_t i = 0; i < plan->head.channels; i++) {
        const HeadThreshold own = channel_threshold(plan, found, i);
        const float code = between(half_up(codes[i]) + own.baseline, 0.0f, (float)plan->top[i]);
        values[i] = own.theta * (code - own.baseline);
        codes[i] = code;
    }
}

/* The same of neurons that fire either sign, whose codes are stored raised by their top. */
static inline void signed_codes(const HeadPlan *plan, const HeadThreshold *found, float *values, float *codes) {
    for (int32_t i = 0; i < plan->head.channels; i++) {
        const HeadThreshold own = channel_threshold(plan, found, i);
        const float top = (float)plan->top[i], size = half_up(fabsf(codes[i])), kept = size > top ? top : size, code = codes[i] < 0.0f ? -kept : kept;
        values[i] = own.theta * (code - own.baseline);
        codes[i] = code + top;
    }
}

/* Codes of a section, numbers from 0 on, into its bytes, which are zero. */
static inline void pack_section(const Section *section, const float *codes, uint8_t *row) {
    const int32_t bits = section->bits, each = 8 / bits;
    int32_t i = 0;
    if (bits == 4)
        for (; i + each <= section->count; i += each) row[i / each] = (uint8_t)((int32_t)codes[i] | (int32_t)codes[i + 1] << 4);
    else if (bits == 8)
        for (; i < section->count; i++) row[i] = (uint8_t)(int32_t)codes[i];
    for (; i < section->count; i++) {
        const uint32_t stored = (uint32_t)(int32_t)codes[i];
        const int32_t at = i * bits, shift = at & 7;
        row[at >> 3] |= (uint8_t)(stored << shift);
        if (shift + bits > 8) row[(at >> 3) + 1] |= (uint8_t)(stored >> (8 - shift));
    }
}

/* Code one token of a head. Every float operation is that of kernels/torch/heads.py, in the same order. ordered, masked: room for the channels each. */
static inline void code_head(const HeadPlan *plan, const float *x, float *ordered, float *masked, uint8_t *row, float *values) {
    const HeadHeader *head = &plan->head;
    const int32_t channels = head->channels, is_signed = head->mode == SIGNED;
    HeadThreshold found[RANGES] = {{0.0f, 0.0f}};
    for (int32_t i = 0; i < channels; i++) ordered[i] = x[plan->channel[i]];
    for (int32_t r = 0; r < head->ranges; r++) {
        const float *own = ordered;
        float low, high;
        int32_t among = channels;
        if (head->ranges > 1) {
            for (int32_t i = among = 0; i < channels; i++) {
                masked[i] = ordered[i] * (plan->range[i] == r ? 1.0f : 0.0f);
                among += plan->range[i] == r;
            }
            own = masked;
        }
        const int finite = coded_range(own, channels, head->share, head->by_mean, among > 0 ? among : 1, &low, &high);
        found[r] = head_threshold(low, high, finite, head);
    }
    for (int32_t i = 0; i < channels; i++) {
        const float units = ordered[i] / channel_threshold(plan, found, i).theta;
        masked[i] = units == units ? units : 0.0f;
    }
    for (int32_t i = 0; plan->price.any && i < channels; i++) masked[i] = worth(&plan->price, masked[i], is_signed);
    if (is_signed)
        signed_codes(plan, found, ordered, masked);
    else
        raised_codes(plan, found, ordered, masked);
    for (int32_t i = 0; values && i < channels; i++) values[plan->channel[i]] = ordered[i];
    if (!row) return;
    memset(row, 0, (size_t)head->row_bytes);
    const float *codes = masked;
    uint8_t *section_row = row;
    for (int32_t s = 0; s < SECTIONS; s++) {
        pack_section(&head->sections[s], codes, section_row);
        codes += head->sections[s].count, section_row += head->sections[s].bytes;
    }
    for (int32_t r = 0; r < head->ranges; r++) {
        uint32_t bits;
        memcpy(&bits, &found[r].theta, sizeof bits);
        section_row[2 * r] = (uint8_t)(bits >> 16);
        section_row[2 * r + 1] = (uint8_t)(bits >> 24);
        row[head->row_bytes - head->ranges + r] = (uint8_t)(int32_t)found[r].baseline;
    }
}

static inline float sum_lanes(float *lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

/* What work on the rows of one head needs: a table `(queries, ranges, width)` of zeros, fineness by range, a row and its codes. */
typedef struct { float *table, *fineness, *codes; uint8_t *row; } Work;

/* Returns 0 where memory ran out; end_work frees what there is. */
static inline int start_work(const HeadPlan *plan, int64_t queries, Work *work) {
    const int64_t width = plan->head.width, ranges = plan->head.ranges;
    work->table = calloc((size_t)((queries + 1) * ranges * width + width), sizeof(float));
    work->row = calloc((size_t)plan->head.row_bytes + SLACK, 1);
    if (!work->table || !work->row) return 0;
    work->fineness = work->table + queries * ranges * width;
    work->codes = work->fineness + ranges * width;
    place_fineness(plan, work->fineness);
    return 1;
}

static inline void end_work(Work *work) {
    free(work->table);
    free(work->row);
}

/* A row where bytes beyond it may be read, its codes, and its thresholds. */
static inline void read_row(const HeadHeader *head, const uint8_t *rows, int64_t at, Work *work, float *theta) {
    memcpy(work->row, rows + at * head->row_bytes, (size_t)head->row_bytes);
    unpack_row_of_head(head, work->row, work->fineness, work->codes);
    for (int32_t r = 0; r < head->ranges; r++) theta[r] = theta_in(work->row, head, r);
}

/* Products of `own` queries, (own, channels), with rows: scores, (own, tokens). */
static inline void scores_of_head(const HeadPlan *plan, const float *query, int64_t own, const uint8_t *rows, int64_t tokens, Work *work, float *scores) {
    const HeadHeader *head = &plan->head;
    const int64_t width = head->width, ranges = head->ranges;
    float *table = work->table, *codes = work->codes; /* queries by range, in the order of unpacked codes */
    for (int64_t q = 0; q < own; q++)
        for (int32_t i = 0; i < head->channels; i++) {
            const float value = query[q * head->channels + plan->channel[i]];
            table[(q * ranges + plan->range[i]) * width + plan->place[i]] = value / plan->fineness[i];
        }
    for (int64_t t = 0; t < tokens; t++) {
        float theta[RANGES];
        read_row(head, rows, t, work, theta);
        for (int64_t q = 0; q < own; q++) {
            float score = 0.0f;
            for (int32_t r = 0; r < ranges; r++) {
                const float *wanted = table + (q * ranges + r) * width;
                float lanes[LANES] = {0};
                for (int64_t i = 0; i < width; i += LANES)
                    for (int lane = 0; lane < LANES; lane++) lanes[lane] += wanted[i + lane] * codes[i + lane];
                score += theta[r] * sum_lanes(lanes);
            }
            scores[q * tokens + t] = score;
        }
    }
}

/* Sums of rows by weights, (own, tokens): output, (own, channels). */
static inline void sums_of_head(const HeadPlan *plan, const float *weights, int64_t own, const uint8_t *rows, int64_t tokens, Work *work, float *output) {
    const HeadHeader *head = &plan->head;
    const int64_t width = head->width, ranges = head->ranges;
    float *sums = work->table, *codes = work->codes; /* of codes less baselines, by range */
    for (int64_t t = 0; t < tokens; t++) {
        float theta[RANGES];
        read_row(head, rows, t, work, theta);
        for (int32_t r = 0; r < ranges; r++) {
            for (int64_t q = 0; q < own; q++) {
                const float weight = weights[q * tokens + t] * theta[r];
                float *sum = sums + (q * ranges + r) * width;
                for (int64_t i = 0; i < width; i += LANES)
                    for (int lane = 0; lane < LANES; lane++) sum[i + lane] += weight * codes[i + lane];
            }
        }
    }
    for (int64_t q = 0; q < own; q++)
        for (int32_t i = 0; i < head->channels; i++)
            output[q * head->channels + plan->channel[i]] = sums[(q * ranges + plan->range[i]) * width + plan->place[i]] / plan->fineness[i];
}
#endif
