/* A spiking linear layer in merged execution: inputs become spike counts, one integer product stands for all steps, thresholds and scales end the sums.

   y[n, o] = Σ_segments (Σ_c q[n, c]·(code[o, c] − zero[o]) − z[n]·Σ_c (code[o, c] − zero[o])) · θ[n] · scale[o]   (+ bias[o]), segments in order, float32 without contraction */
#include <stdlib.h>
#include "dot.h"
#include "encode.h"
#include "floats.h"

#define STRIP 32 /* rows of weights that are unpacked at a time: with their columns they fit into a second-level cache */

/* Which instructions this file was compiled for. */
int32_t spikellm_level(void) {
#if defined(__AVX512VNNI__)
    return 2;
#elif defined(__AVX2__)
    return 1;
#else
    return 0;
#endif
}

/* The best level that the processor bears. */
int32_t spikellm_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

/* What rows of weights share in one segment and token. */
typedef struct { const int32_t *column_sums; const float *scale; const uint8_t *zero; float theta; int64_t baseline, total, lifted; } Ending;

static inline Ending ending_of(const Plan *plan, const Threshold *thresholds, const int32_t *totals, int32_t segment, const int32_t *column_sums, const float *scale, const uint8_t *zero) {
    const Segment *part = &plan->segments[segment];
    const int64_t total = totals[segment];
    return (Ending){column_sums + (int64_t)segment * plan->head.out, scale + part->weight_group, zero + part->weight_group, thresholds[part->group].theta,
                    thresholds[part->group].baseline, total, plan->head.bits == 8 ? 128 * total : 0};
}

/* Sums of `count` rows from `row` on become outputs, which `y` gathers over the segments. */
static inline void end_sums(const Ending *end, int32_t scales, int32_t row, int32_t count, const int32_t *sums, float *y) {
    for (int32_t i = 0; i < count; i++) {
        const int64_t at = (int64_t)(row + i) * scales;
        const int64_t charge = sums[i] + end->lifted - end->zero[at] * end->total - end->baseline * end->column_sums[row + i];
        y[i] += (float)charge * end->theta * end->scale[at];
    }
}

/* Returns 0, or 1 where memory ran out.

   x: (tokens, in); packed: (out, row_bytes); scale, zero: (out, scales); column_sums: (segments, out), Σ (code − zero); bias: (out) or null; y: (tokens, out);
   codes_out: spike counts, (tokens, in), signed ones raised by their top, or null; baselines_out: (tokens, groups), or null; type: of x and y, see floats.h. */
int32_t spikellm_spike_linear(const void *x, int64_t tokens, const int32_t *words, const uint8_t *packed, const float *scale, const uint8_t *zero, const int32_t *column_sums,
                              const float *bias, void *y, uint8_t *codes_out, int32_t *baselines_out, int32_t type, int32_t threads) {
    const Plan plan = read_plan(words);
    const Header *head = &plan.head;
    if (tokens == 0 || head->out == 0) return 0;
    uint8_t *spikes = calloc((size_t)tokens, (size_t)head->buffer + 1);
    Threshold *thresholds = malloc(sizeof(Threshold) * (size_t)tokens * (size_t)(head->groups + 1));
    int32_t *totals = malloc(sizeof(int32_t) * (size_t)tokens * (size_t)(head->segments + 1));
    const int allocated = spikes && thresholds && totals;
    int32_t failed = !allocated, longest = 0;
    for (int32_t s = 0; s < head->segments; s++) longest = plan.segments[s].blocks > longest ? plan.segments[s].blocks : longest;
    const int32_t stride = longest * head->block;
    if (threads > tokens * head->out) threads = (int32_t)(tokens * head->out);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *ordered = !allocated ? NULL : malloc(sizeof(float) * 2 * (size_t)(head->in + 1));
        uint8_t *codes = !allocated ? NULL : malloc((size_t)head->in + 1);
        int8_t *unpacked = !allocated ? NULL : malloc((size_t)STRIP * (size_t)stride + 1);
        float *outputs = !allocated ? NULL : malloc(sizeof(float) * STRIP * (size_t)tokens); /* of a strip, token by token */
        const int ready = ordered && codes && unpacked && outputs;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++) {
            if (!ready) continue;
            encode_token(&plan, load_row(x, type, n, head->in, ordered + head->in + 1), ordered, codes_out ? codes_out + n * head->in : codes, spikes + n * head->buffer,
                         thresholds + n * head->groups, totals + n * head->segments);
            for (int32_t a = 0; baselines_out && a < head->groups; a++) baselines_out[n * head->groups + a] = thresholds[n * head->groups + a].baseline;
        }
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < (head->out + STRIP - 1) / STRIP; strip++) {
            if (!ready) continue;
            const int32_t first = (int32_t)strip * STRIP, count = head->out - first < STRIP ? head->out - first : STRIP;
            memset(outputs, 0, sizeof(float) * STRIP * (size_t)tokens);
            int32_t sums[STRIP], whole = tokens > 1;
            for (int32_t s = 0; !whole && s < head->segments; s++) { /* one token: straight from the packed rows */
                const Segment *part = &plan.segments[s];
                whole = !dot_rows(spikes + part->offset, packed + (int64_t)first * head->row_bytes, head->row_bytes, count, head->bits, part->first_block, part->blocks, sums);
                const Ending end = ending_of(&plan, thresholds, totals, s, column_sums, scale, zero);
                if (!whole) end_sums(&end, head->scales, first, count, sums, outputs);
            }
            for (int32_t s = 0; whole && s < head->segments; s++) {
                const Segment *part = &plan.segments[s];
                const int32_t length = part->blocks * head->block;
                for (int32_t o = 0; o < STRIP; o++) /* rows beyond the last repeat it */
                    unpack_row(packed + (int64_t)(first + (o < count ? o : count - 1)) * head->row_bytes, head->row_bytes, head->bits, head->in, part->first_block, part->blocks,
                               unpacked + (int64_t)o * stride);
                for (int64_t n = 0; n < tokens; n += TOKENS) {
                    const int32_t some = (int32_t)(tokens - n < TOKENS ? tokens - n : TOKENS);
                    const uint8_t *q[TOKENS];
                    for (int t = 0; t < TOKENS; t++) q[t] = spikes + (n + (t < some ? t : 0)) * head->buffer + part->offset;
                    Ending ends[TOKENS];
                    for (int32_t t = 0; t < some; t++) ends[t] = ending_of(&plan, thresholds + (n + t) * head->groups, totals + (n + t) * head->segments, s, column_sums, scale, zero);
                    for (int32_t o = 0; o < count; o += ROWS) {
                        int32_t tile[TOKENS * ROWS];
                        dot_tile(q, some, unpacked + (int64_t)o * stride, stride, length, tile);
                        for (int32_t t = 0; t < some; t++)
                            end_sums(&ends[t], head->scales, first + o, count - o < ROWS ? count - o : ROWS, tile + t * ROWS, outputs + (n + t) * STRIP + o);
                    }
                }
            }
            for (int64_t n = 0; n < tokens; n++) {
                float *own = outputs + n * STRIP;
                for (int32_t o = 0; bias && o < count; o++) own[o] += bias[first + o];
                store_row(y, type, n * head->out + first, own, count);
            }
        }
        free(ordered);
        free(codes);
        free(unpacked);
        free(outputs);
    }
    free(spikes);
    free(thresholds);
    free(totals);
    return failed;
}
