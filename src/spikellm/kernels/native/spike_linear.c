/* A spiking linear layer in merged form: inputs become spike counts, one integer product stands for all steps, thresholds and scales end the sums.

   y[n, o] = Σ_segments (Σ_c q[n, c]·(code[o, c] − zero[o]) − z[n]·Σ_c (code[o, c] − zero[o])) · θ[n] · scale[o]   (+ bias[o]), segments in order, float32 without contraction */
#include <stdlib.h>
#include "dot.h"
#include "encode.h"

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

static void end_sums(const Plan *plan, const Threshold *thresholds, const int32_t *totals, int32_t segment, int32_t row, int32_t sum, const int32_t *column_sums, const float *scale,
                     const uint8_t *zero, float *y) {
    const Segment *part = &plan->segments[segment];
    int64_t at = (int64_t)row * plan->head.scales + part->weight_group, charge = sum;
    if (plan->head.bits == 8) charge += 128 * (int64_t)totals[segment];
    charge -= (int64_t)zero[at] * totals[segment];
    charge -= (int64_t)thresholds[part->group].baseline * column_sums[(int64_t)segment * plan->head.out + row];
    *y += (float)charge * thresholds[part->group].theta * scale[at];
}

/* Returns 0, or 1 where memory ran out.

   x: (tokens, in); packed: (out, row_bytes); scale, zero: (out, scales); column_sums: (segments, out), Σ (code − zero); bias: (out) or null; y: (tokens, out);
   codes_out: spike counts, (tokens, in), signed ones raised by their top, or null. */
int32_t spikellm_spike_linear(const float *x, int64_t tokens, const int32_t *words, const uint8_t *packed, const float *scale, const uint8_t *zero, const int32_t *column_sums,
                              const float *bias, float *y, uint8_t *codes_out, int32_t threads) {
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
        float *ordered = !allocated ? NULL : malloc(sizeof(float) * (size_t)(head->in + 1));
        uint8_t *codes = !allocated ? NULL : malloc((size_t)head->in + 1);
        int8_t *unpacked = !allocated ? NULL : malloc((size_t)STRIP * (size_t)stride + 1);
        const int ready = ordered && codes && unpacked;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++)
            if (ready)
                encode_token(&plan, x + n * head->in, ordered, codes_out ? codes_out + n * head->in : codes, spikes + n * head->buffer, thresholds + n * head->groups, totals + n * head->segments);
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < (head->out + STRIP - 1) / STRIP; strip++) {
            if (!ready) continue;
            const int32_t first = (int32_t)strip * STRIP, end = head->out - first < STRIP ? head->out : first + STRIP;
            for (int64_t n = 0; n < tokens; n++)
                for (int32_t o = first; o < end; o++) y[n * head->out + o] = 0.0f;
            int32_t sums[TOKENS * ROWS], whole = tokens > 1;
            for (int32_t o = first; !whole && o < end; o++) /* one token: straight from the packed rows */
                for (int32_t s = 0; !whole && s < head->segments; s++) {
                    const Segment *part = &plan.segments[s];
                    whole = !dot_packed(spikes + part->offset, packed + (int64_t)o * head->row_bytes, head->row_bytes, head->bits, part->first_block, part->blocks, sums);
                    if (!whole) end_sums(&plan, thresholds, totals, s, o, sums[0], column_sums, scale, zero, &y[o]);
                }
            for (int32_t s = 0; whole && s < head->segments; s++) {
                const Segment *part = &plan.segments[s];
                const int32_t length = part->blocks * head->block;
                for (int32_t o = first; o < first + STRIP; o++) /* rows beyond the last repeat it */
                    unpack_row(packed + (int64_t)(o < end ? o : end - 1) * head->row_bytes, head->row_bytes, head->bits, head->in, part->first_block, part->blocks,
                               unpacked + (int64_t)(o - first) * stride);
                for (int64_t n = 0; n < tokens; n += TOKENS) {
                    const int32_t some = (int32_t)(tokens - n < TOKENS ? tokens - n : TOKENS);
                    const uint8_t *q[TOKENS];
                    for (int t = 0; t < TOKENS; t++) q[t] = spikes + (n + (t < some ? t : 0)) * head->buffer + part->offset;
                    for (int32_t o = first; o < end; o += ROWS) {
                        dot_tile(q, some, unpacked + (int64_t)(o - first) * stride, stride, length, sums);
                        for (int32_t t = 0; t < some; t++)
                            for (int32_t r = 0; r < ROWS && o + r < end; r++)
                                end_sums(&plan, thresholds + (n + t) * head->groups, totals + (n + t) * head->segments, s, o + r, sums[t * ROWS + r], column_sums, scale, zero,
                                         &y[(n + t) * head->out + o + r]);
                    }
                }
            }
            for (int64_t n = 0; bias && n < tokens; n++)
                for (int32_t o = first; o < end; o++) y[n * head->out + o] += bias[o];
        }
        free(ordered);
        free(codes);
        free(unpacked);
    }
    free(spikes);
    free(thresholds);
    free(totals);
    return failed;
}
