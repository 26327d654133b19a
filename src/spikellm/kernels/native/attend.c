/* Attention of a few queries over keys and values that are numbers, as the model library's interface asks for it. See numbers.h. */
#include "numbers.h"

/* Returns 0, or 1 where memory ran out.

   sizes: batch, heads, heads of keys and values, queries, tokens, channels of a key and of a value, elements from one sequence to the next and from one head to the next of keys
   and of values, type of their numbers, threads, lanes of torch's vectors; query: (batch, heads, queries, channels); seen: (batch, queries, tokens) or null; out: (batch, heads, queries, channels). */
int32_t spikellm_attend(const float *query, const char *keys, const char *values, const uint8_t *seen, float *out, const int64_t *sizes, float scaling, float softcap) {
    const int64_t batch = sizes[0], heads = sizes[1], own = sizes[2], queries = sizes[3], tokens = sizes[4], threads = sizes[12], rows = heads / own * queries;
    const int64_t bytes = sizes[11] == FLOAT32 ? 4 : 2;
    const Numbers numbers = {tokens, (int32_t)sizes[5], (int32_t)sizes[6], (int32_t)sizes[11], (int32_t)sizes[13], scaling, softcap};
    int32_t failed = 0;
#pragma omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)
    for (int64_t n = 0; n < batch * own; n++) {
        const int64_t sequence = n / own, head = n % own;
        const int done = attend_to_rows(&numbers, query + n * rows * sizes[5], rows, queries, keys + (sequence * sizes[7] + head * sizes[8]) * bytes,
                                        values + (sequence * sizes[9] + head * sizes[10]) * bytes, seen ? seen + sequence * queries * tokens : NULL, out + n * rows * sizes[6]);
        if (!done) {
#pragma omp atomic write
            failed = 1;
        }
    }
    return failed;
}
