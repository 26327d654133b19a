/* Attention on rows of spikes: coding tokens of heads into rows, products of queries with cached keys, sums of cached values. See rows.h. */
#include "rows.h"

/* Returns 0, or 1 where memory ran out.   x, values: (batch, heads, tokens, channels); rows: (batch, heads, tokens, row bytes); rows or values may be null. */
int32_t spikellm_code_heads(const float *x, int64_t batch, int64_t heads, int64_t tokens, const int32_t *words, uint8_t *rows, float *values, int32_t threads) {
    const HeadHeader *head = (const HeadHeader *)words;
    int32_t failed = 0;
    if (batch * heads * tokens < 64) threads = 1; /* a thread costs more than that */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = malloc(sizeof(float) * 2 * ((size_t)head->channels + 1));
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < batch * heads * tokens; n++) {
            if (!room) continue;
            const HeadPlan plan = read_head_plan(words, n / tokens % heads);
            code_head(&plan, x + n * head->channels, room, room + head->channels, rows ? rows + n * head->row_bytes : NULL, values ? values + n * head->channels : NULL);
        }
        free(room);
    }
    return failed;
}

/* What both products do for one head after the other. */
typedef void Product(const HeadPlan *, const float *, int64_t, const uint8_t *, int64_t, Work *, float *);

static int32_t by_head(Product *product, const float *x, const int64_t sizes[4], const uint8_t *rows, int64_t tokens, const int32_t *words, float *found, int32_t threads) {
    const HeadHeader *head = (const HeadHeader *)words;
    const int64_t heads = sizes[1], own = sizes[2] * sizes[3], keys = product == scores_of_head, from = keys ? head->channels : tokens, to = keys ? tokens : head->channels;
    int32_t failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t n = 0; n < sizes[0] * heads; n++) {
        const HeadPlan plan = read_head_plan(words, n % heads);
        Work work;
        if (!start_work(&plan, own, &work)) {
#pragma omp atomic write
            failed = 1;
        } else {
            product(&plan, x + n * own * from, own, rows + n * tokens * head->row_bytes, tokens, &work, found + n * own * to);
        }
        end_work(&work);
    }
    return failed;
}

/* Products of queries with cached keys.   query: (batch, heads · shared, queries, channels); rows: (batch, heads, tokens, row bytes); scores: (batch, heads · shared, queries, tokens). */
int32_t spikellm_key_scores(const float *query, int64_t batch, int64_t heads, int64_t shared, int64_t queries, const uint8_t *rows, int64_t tokens, const int32_t *words, float *scores,
                            int32_t threads) {
    return by_head(scores_of_head, query, (const int64_t[]){batch, heads, shared, queries}, rows, tokens, words, scores, threads);
}

/* Sums of cached values by weights.   weights: (batch, heads · shared, queries, tokens); output: (batch, heads · shared, queries, channels). */
int32_t spikellm_value_sums(const float *weights, int64_t batch, int64_t heads, int64_t shared, int64_t queries, const uint8_t *rows, int64_t tokens, const int32_t *words, float *output,
                            int32_t threads) {
    return by_head(sums_of_head, weights, (const int64_t[]){batch, heads, shared, queries}, rows, tokens, words, output, threads);
}
