/* A spiking linear layer in merged execution: inputs become spike counts, one integer product stands for all steps, thresholds and scales end the sums. See linear.h. */
#if defined(__linux__)
#define _GNU_SOURCE /* syscall */
#endif
#include <stdlib.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "linear.h"

/* Which instructions this file was compiled for. */
int32_t spikellm_level(void) {
#if defined(__AMX_INT8__)
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
/* Whether the processor multiplies bytes in tiles, and the system lets this process use them once it is asked. */
static int has_tiles(void) {
    uint32_t a, b, c, d;
    const uint32_t tiles = 1u << 24 | 1u << 25; /* AMX-TILE, AMX-INT8 */
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
#endif
    return 0;
}

/* Returns 0, or 1 where memory ran out.

   x: (tokens, in); y: (tokens, out); codes_out: spike counts, (tokens, in), signed ones raised by their top, or null; baselines_out: (tokens, groups), or null; type: of x
   and y, see floats.h; the others as linear.h has them. */
int32_t spikellm_spike_linear(const void *x, int64_t tokens, const int32_t *words, const uint8_t *packed, const float *scale, const uint8_t *zero, const int32_t *column_sums,
                              const float *bias, void *y, uint8_t *codes_out, int32_t *baselines_out, int32_t type, int32_t threads) {
    Linear layer = {read_plan(words), packed, zero, scale, bias, column_sums, tokens, NULL, NULL, NULL, tiles_pay(tokens)};
    const Header *head = &layer.plan.head;
    if (tokens == 0 || head->out == 0) return 0;
    layer.spikes = calloc((size_t)room_of(tokens), (size_t)head->buffer + 1);
    layer.thresholds = malloc(sizeof(Threshold) * (size_t)tokens * (size_t)(head->groups + 1));
    layer.totals = malloc(sizeof(int32_t) * (size_t)tokens * (size_t)(head->segments + 1));
    const int allocated = layer.spikes && layer.thresholds && layer.totals;
    int32_t failed = !allocated;
    if (threads > tokens * head->out) threads = (int32_t)(tokens * head->out);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = !allocated ? NULL : malloc(sizeof(float) * 2 * (size_t)(head->in + 1));
        uint8_t *codes = !allocated ? NULL : malloc((size_t)head->in + 1);
        int8_t *unpacked = !allocated ? NULL : malloc(unpacked_bytes(&layer));
        float *outputs = !allocated ? NULL : malloc(sizeof(float) * STRIP * (size_t)tokens); /* of a strip, token by token */
        const int ready = room && codes && unpacked && outputs;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++) {
            if (!ready) continue;
            place_token(&layer, x, type, n, room, codes_out ? codes_out + n * head->in : codes);
            for (int32_t a = 0; baselines_out && a < head->groups; a++) baselines_out[n * head->groups + a] = layer.thresholds[n * head->groups + a].baseline;
        }
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips_of(head); strip++)
            if (ready) run_strip(&layer, strip, unpacked, outputs, y, type);
        free(room);
        free(codes);
        free(unpacked);
        free(outputs);
    }
    free(layer.spikes);
    free(layer.thresholds);
    free(layer.totals);
    return failed;
}
