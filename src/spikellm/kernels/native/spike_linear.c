/* A spiking linear layer in merged execution: inputs become spike counts, one integer product stands for all steps, thresholds and scales end the sums. See linear.h. */
#if defined(__linux__)
#define _GNU_SOURCE /* syscall */
#endif
#include <stdlib.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "linear.h"

/* Which instructions this file was compiled for: the place in the list of this kind of processor, see build.py. */
int32_t spikellm_level(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#elif defined(__AMX_INT8__)
    return 3;
#elif defined(__AVX512VNNI__)
    return 2;
#elif defined(__AVX2__)
    return 1;
#else
    return 0;
#endif
}

#if defined(__x86_64__) && defined(__linux__)
/* Whether the processor multiplies bytes and bfloat16 in tiles, and the system lets this process use them once it is asked. */
static int has_tiles(void) {
    uint32_t a, b, c, d;
    const uint32_t tiles = 1u << 22 | 1u << 24 | 1u << 25; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tiles) == tiles && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
}
#elif defined(__x86_64__)
static int has_tiles(void) { return 0; }
#endif

/* The best level that the processor bears. */
int32_t spikellm_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
        return has_tiles() ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#elif defined(__aarch64__) && defined(__APPLE__)
    return 1; /* all of them multiply bytes */
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & 1ul << 20 /* HWCAP_ASIMDDP */) return 1;
#endif
    return 0;
}

/* All tokens coded, where they are not yet, and all strips. codes, baselines: see spikellm_spike_linear. */
static int32_t run_layer(const Linear *layer, const void *x, void *y, uint8_t *codes_out, int32_t *baselines_out, int32_t type, int taken, int32_t threads) {
    const Header *head = &layer->plan.head;
    const int64_t tokens = layer->tokens;
    int32_t failed = 0;
    if (threads > tokens * head->out) threads = (int32_t)(tokens * head->out);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = malloc(sizeof(float) * 2 * (size_t)(head->in + 1));
        uint8_t *codes = malloc((size_t)head->in + 1);
        int8_t *unpacked = malloc(unpacked_bytes(layer));
        float *outputs = malloc(sizeof(float) * STRIP * (size_t)tokens); /* of a strip, token by token */
        const int ready = room && codes && unpacked && outputs;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++) {
            if (!ready || taken) continue;
            place_token(layer, x, type, n, room, codes_out ? codes_out + n * head->in : codes);
            for (int32_t a = 0; baselines_out && a < head->groups; a++) baselines_out[n * head->groups + a] = layer->thresholds[n * head->groups + a].baseline;
        }
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips_of(head); strip++)
            if (ready) run_strip(layer, strip, unpacked, outputs, y, type);
        free(room);
        free(codes);
        free(unpacked);
        free(outputs);
    }
    return failed;
}

/* Bytes of what so many tokens of a layer are coded to. */
int64_t spikellm_coded_bytes(const int32_t *words, int64_t tokens) {
    const Plan plan = read_plan(words);
    return (int64_t)coded_bytes(&plan.head, tokens);
}

/* Returns 0, or 1 where memory ran out.

   x: (tokens, in); y: (tokens, out); codes_out: spike counts, (tokens, in), signed ones raised by their top, or null; baselines_out: (tokens, groups), or null; memory:
   spikellm_coded_bytes that layers coding alike may take over, or null for none; taken: whether it holds these tokens already: x is not read then, and nothing but y written;
   type: of x and y, see floats.h; the others as linear.h has them. */
int32_t spikellm_spike_linear(const void *x, int64_t tokens, const int32_t *words, const uint8_t *packed, const float *scale, const uint8_t *zero, const int32_t *column_sums,
                              const float *bias, void *y, uint8_t *codes_out, int32_t *baselines_out, void *memory, int32_t taken, int32_t type, int32_t threads) {
    Linear layer = {.plan = read_plan(words), .packed = packed, .zero = zero, .scale = scale, .bias = bias, .column_sums = column_sums, .tokens = tokens};
    if (tokens == 0 || layer.plan.head.out == 0) return 0;
    void *const own = memory ? NULL : malloc(coded_bytes(&layer.plan.head, tokens));
    if (!memory && !own) return 1;
    code_to(&layer, memory ? memory : own, taken);
    const int32_t failed = run_layer(&layer, x, y, codes_out, baselines_out, type, taken, threads);
    free(own);
    return failed;
}

/* Sum of a packed row over one segment, whose counts are one where its columns stand: as if all of them fired once. */
static int32_t sum_of_row(const Plan *plan, const Segment *part, const uint8_t *ones, const uint8_t *row, int8_t *unpacked) {
    const Header *head = &plan->head;
    int32_t sum = 0;
    if (dot_packed(ones, row, head->row_bytes, head->bits, part->first_block, part->blocks, &sum)) return sum;
    unpack_row(row, head->row_bytes, head->bits, head->in, part->first_block, part->blocks, unpacked);
    for (int32_t i = 0; i < part->blocks * head->block; i++) sum += (int32_t)ones[i] * (int32_t)unpacked[i];
    return sum;
}

/* Σ (code − zero) over the columns of every segment: sums, (segments, out). Returns 0, or 1 where memory ran out. */
int32_t spikellm_column_sums(const int32_t *words, const uint8_t *packed, const uint8_t *zero, int32_t *sums, int32_t threads) {
    const Plan plan = read_plan(words);
    const Header *head = &plan.head;
    uint8_t *const codes = malloc((size_t)head->in + 1), *const ones = calloc((size_t)head->buffer + 1, 1);
    int32_t failed = !codes || !ones;
    if (!failed) memset(codes, 1, (size_t)head->in);
    for (int32_t s = 0; !failed && s < head->segments; s++) place_segment(&plan, &plan.segments[s], codes, ones);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int8_t *unpacked = malloc((size_t)stride_of(&plan) + 1);
        if (!unpacked) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < head->out; o++)
            for (int32_t s = 0; !failed && s < head->segments; s++) {
                const Segment *part = &plan.segments[s];
                const int32_t count = part->stop - part->start, lifted = head->bits == 8 ? 128 : 0;
                const int32_t sum = sum_of_row(&plan, part, ones + part->offset, packed + o * head->row_bytes, unpacked);
                sums[(int64_t)s * head->out + o] = sum + (lifted - (int32_t)zero[o * head->scales + part->weight_group]) * count;
            }
        free(unpacked);
    }
    free(codes);
    free(ones);
    return failed;
}
