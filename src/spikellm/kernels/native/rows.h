/* Work on one head that any schedule may call: coding a token into a row, products of queries with rows of keys, sums of rows of values. The rows of a head stand one behind
   the other; they are never unpacked as a whole. */
#ifndef SPIKELLM_ROWS_H
#define SPIKELLM_ROWS_H
#include "heads.h"

/* Code one token of a head. Every float operation is that of kernels/torch/heads.py, in the same order. */
static inline void code_head(const HeadPlan *plan, const float *x, float *ordered, float *masked, uint8_t *row, float *values) {
    const HeadHeader *head = &plan->head;
    HeadThreshold found[RANGES] = {{0.0f, 0.0f}};
    for (int32_t i = 0; i < head->channels; i++) ordered[i] = x[plan->channel[i]];
    for (int32_t r = 0; r < head->ranges; r++) {
        const float *own = ordered;
        float low, high;
        int32_t among = head->channels;
        if (head->ranges > 1) {
            for (int32_t i = among = 0; i < head->channels; i++) {
                masked[i] = ordered[i] * (plan->range[i] == r ? 1.0f : 0.0f);
                among += plan->range[i] == r;
            }
            own = masked;
        }
        const int finite = coded_range(own, head->channels, head->share, head->by_mean, among > 0 ? among : 1, &low, &high);
        found[r] = head_threshold(low, high, finite, head);
    }
    if (row) memset(row, 0, (size_t)head->row_bytes);
    uint8_t *section_row = row;
    for (int32_t s = 0, i = 0; s < SECTIONS; s++) {
        const Section *section = &head->sections[s];
        for (int32_t within = 0; within < section->count; within++, i++) {
            HeadThreshold own = found[0];
            if (head->ranges > 1) {
                const float first = plan->range[i] == 0 ? 1.0f : 0.0f, second = 1.0f - first;
                own.theta = found[0].theta * first + found[1].theta * second;
                own.baseline = found[0].baseline * first + found[1].baseline * second;
            }
            const float theta = own.theta / plan->fineness[i], baseline = own.baseline * plan->fineness[i], top = (float)plan->top[i];
            float units = ordered[i] / theta, code;
            units = units == units ? units : 0.0f;
            if (plan->price.any) units = worth(&plan->price, units, head->mode == SIGNED);
            if (head->mode == SIGNED) {
                const float size = half_up(between(fabsf(units), 0.0f, FAR));
                code = size > top ? top : size;
                code = units < 0.0f ? -code : code;
            } else {
                code = between(half_up(between(units, -FAR, FAR)) + baseline, 0.0f, top);
            }
            if (values) values[plan->channel[i]] = theta * (code - baseline);
            if (row) {
                const uint32_t stored = (uint32_t)(int32_t)(code + (head->mode == SIGNED ? top : 0.0f));
                const int32_t at = within * section->bits, shift = at & 7;
                section_row[at >> 3] |= (uint8_t)(stored << shift);
                if (shift + section->bits > 8) section_row[(at >> 3) + 1] |= (uint8_t)(stored >> (8 - shift));
            }
        }
        if (row) section_row += section->bytes;
    }
    for (int32_t r = 0; row && r < head->ranges; r++) {
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
