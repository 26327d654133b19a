/* A linear layer of ternary weights on 16- or 32-bit inputs, by additions alone (additive.h), or, of many tokens where the processor has tiles of bfloat16, in these (additive_tiles.h). */
#include "additive_tiles.h"

/* Returns 0, or 1 where memory ran out.   x: (tokens, in); y: (tokens, out); type: of x and y, see floats.h. */
int32_t spikellm_additive_linear(const void *x, int64_t tokens, const int32_t *plan, const uint32_t *words, const float *scale, const float *bias, void *y, int32_t type,
                                 int32_t threads) {
    const Additive layer = read_additive(plan, words, scale, bias);
    const int32_t in = layer.head->in, out = layer.head->out;
    if (tokens == 0 || out == 0) return 0;
#if defined(__AMX_BF16__)
    if (tokens > MOST_ADDED) return run_in_tiles(&layer, x, tokens, y, type, threads);
#endif
    float *tables = aligned_alloc(64, sizeof(float) * (table_size(&layer) + ENTRIES)); /* a multiple of 64, as every table is */
    float *room = malloc(sizeof(float) * ((size_t)in + 1));
    const int32_t failed = !tables || !room;
    for (int64_t n = 0; n < tokens && !failed; n++) {
        fill_tables(&layer, load_row(x, type, n, in, room), tables);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int32_t block = 0; block < blocks_of(&layer); block++) run_block(&layer, block, tables, y, type, n * out);
    }
    free(tables);
    free(room);
    return failed;
}
