/* Linear layers of packed integer weights on inputs that are floats, and rows of such weights as floats: weights are decoded in registers, and memory is read as it is stored.

   y[n, o] = Σ_segments scale[o] · Σ_c x[n, c]·(code[o, c] − zero[o])   (+ bias[o]) */
#include <stdlib.h>
#include "floats.h"
#include "weight_only.h"
#include "weight_products.h"

#define ROWS 4    /* that are worked on at a time */
#define TOKENS 4
#define STRIP 32  /* rows that one thread takes at a time */

/* Some rows, their scales and zero-points, and inputs of some tokens in the order of places. */
typedef struct { const uint8_t *row[ROWS], *zero[ROWS]; const float *scale[ROWS], *x[TOKENS]; } Tile;

/* Sums of rows times inputs, token by token. Those of one segment are scaled as they are, those of several lane by lane. `tokens` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void sums_of(int bits, int tokens, const Plan *plan, const Tile *tile, float *sums) {
    Cutter cutter;
    make_cutter(bits, &cutter);
    Floats total[TOKENS][ROWS];
    UNROLLED for (int n = 0; n < tokens; n++) UNROLLED for (int r = 0; r < ROWS; r++) total[n][r] = (Floats){0};
    for (int32_t s = 0; s < plan->head.segments; s++) {
        const Segment *part = &plan->segments[s];
        Floats acc[TOKENS][ROWS], zero[ROWS], table[ROWS];
        UNROLLED for (int r = 0; r < ROWS; r++) {
            const float own = (float)tile->zero[r][part->weight_group];
            zero[r] = (Floats){0} + (8388608.0f + own);
            table[r] = cutter.values - own;
            UNROLLED for (int n = 0; n < tokens; n++) acc[n][r] = (Floats){0};
        }
        int64_t at = (int64_t)part->first_block * 8 * bits, place = part->offset;
        for (int32_t b = 0; b < part->blocks; b++, at += 8 * bits, place += COLUMNS) {
            UNROLLED for (int r = 0; r < ROWS; r++) {
                Words lanes;
                cut_lanes(bits, &cutter, tile->row[r], plan->head.row_bytes, at, &lanes);
                UNROLLED for (int t = 0; t < CODES; t++) {
                    Floats k;
                    take_integers(bits, &lanes, t, &zero[r], &table[r], &k);
                    UNROLLED for (int n = 0; n < tokens; n++) {
                        Floats x;
                        memcpy(&x, tile->x[n] + place + LANES * t, sizeof x);
                        acc[n][r] += x * k;
                    }
                }
            }
        }
        if (plan->head.segments == 1) {
            UNROLLED for (int n = 0; n < tokens; n++) UNROLLED for (int r = 0; r < ROWS; r++) sums[n * ROWS + r] = sum_of(&acc[n][r]) * tile->scale[r][part->weight_group];
            return;
        }
        UNROLLED for (int n = 0; n < tokens; n++) UNROLLED for (int r = 0; r < ROWS; r++) total[n][r] += acc[n][r] * tile->scale[r][part->weight_group];
    }
    UNROLLED for (int n = 0; n < tokens; n++) UNROLLED for (int r = 0; r < ROWS; r++) sums[n * ROWS + r] = sum_of(&total[n][r]);
}

/* A row in the order of places, `buffer` floats; integers alone where `scale` is null. */
static void decode(int bits, const Plan *plan, const uint8_t *row, const float *scale, const uint8_t *zeros, float *out) {
    Cutter cutter;
    make_cutter(bits, &cutter);
    for (int32_t s = 0; s < plan->head.segments; s++) {
        const Segment *part = &plan->segments[s];
        const float own = (float)zeros[part->weight_group], factor = scale ? scale[part->weight_group] : 1.0f;
        const Floats zero = (Floats){0} + (8388608.0f + own), table = cutter.values - own;
        int64_t at = (int64_t)part->first_block * 8 * bits, place = part->offset;
        for (int32_t b = 0; b < part->blocks; b++, at += 8 * bits, place += COLUMNS) {
            Words lanes;
            cut_lanes(bits, &cutter, row, plan->head.row_bytes, at, &lanes);
            UNROLLED for (int t = 0; t < CODES; t++) {
                Floats value;
                take_integers(bits, &lanes, t, &zero, &table, &value);
                value *= factor;
                memcpy(out + place + LANES * t, &value, sizeof value);
            }
        }
    }
}

static __attribute__((noinline)) void sums_of_some(int bits, const Plan *plan, const Tile *tile, float *sums) { sums_of(bits, TOKENS, plan, tile, sums); }

/* One token, where time is that of reading the weights, if turning them into floats is fast enough. */
#if defined(__AVX512VNNI__)
#define DEFINE_WIDTH(bits) \
    static __attribute__((noinline)) void sums_of_one_##bits(const Plan *plan, const Tile *tile, float *sums) { sums_of(bits, 1, plan, tile, sums); }
DEFINE_WIDTH(2)
DEFINE_WIDTH(3)
DEFINE_WIDTH(4)
DEFINE_WIDTH(5)
DEFINE_WIDTH(6)
DEFINE_WIDTH(7)
DEFINE_WIDTH(8)
typedef void Summing(const Plan *, const Tile *, float *);
static Summing *const by_width[] = {sums_of_one_2, sums_of_one_3, sums_of_one_4, sums_of_one_5, sums_of_one_6, sums_of_one_7, sums_of_one_8};
static void sums_of_one(int bits, const Plan *plan, const Tile *tile, float *sums) { by_width[bits - 2](plan, tile, sums); }
#else
static __attribute__((noinline)) void sums_of_one(int bits, const Plan *plan, const Tile *tile, float *sums) { sums_of(bits, 1, plan, tile, sums); }
#endif

WeightSizes weight_sizes(const int32_t *plan) {
    const Header head = read_plan(plan).head;
    return (WeightSizes){head.in, head.out, head.buffer, head.row_bytes, (head.out + STRIP - 1) / STRIP};
}

void place_weight_inputs(const int32_t *words, const float *x, float *placed) {
    const Plan plan = read_plan(words);
    place_inputs(&plan, x, placed);
}

static void run_strip(const WeightOnly *layer, const Plan *plan, int64_t strip) {
    const Header *head = &plan->head;
    const int32_t first = (int32_t)strip * STRIP, count = head->out - first < STRIP ? head->out - first : STRIP;
    for (int64_t n = 0; n < layer->tokens; n += TOKENS) {
        const int32_t some = (int32_t)(layer->tokens - n < TOKENS ? layer->tokens - n : TOKENS);
        float own[TOKENS][STRIP], sums[TOKENS * ROWS];
        Tile tile;
        for (int t = 0; t < TOKENS; t++) tile.x[t] = layer->placed + (n + (t < some ? t : 0)) * head->buffer;
        for (int32_t o = 0; o < count; o += ROWS) {
            for (int r = 0; r < ROWS; r++) { /* rows beyond the last repeat it */
                const int64_t row = first + (o + r < count ? o + r : count - 1);
                tile.row[r] = layer->packed + row * head->row_bytes;
                tile.zero[r] = layer->zero + row * head->scales;
                tile.scale[r] = layer->scale + row * head->scales;
            }
            (some == 1 ? sums_of_one : sums_of_some)(head->bits, plan, &tile, sums);
            for (int32_t t = 0; t < some; t++)
                for (int32_t r = 0; r < ROWS && o + r < count; r++) own[t][o + r] = sums[t * ROWS + r];
        }
        for (int32_t t = 0; t < some; t++) {
            for (int32_t o = 0; layer->bias && o < count; o++) own[t][o] += layer->bias[first + o];
            store_row(layer->y, layer->type, (n + t) * head->out + first, own[t], count);
        }
    }
}

int32_t run_weight_strips(void *work, int64_t first, int64_t last) {
    const WeightOnly *layer = work;
    const Plan plan = read_plan(layer->plan);
    for (int64_t strip = first; strip < last; strip++) run_strip(layer, &plan, strip);
    return 0;
}

/* Returns 0, or 1 where memory ran out.

   x: (tokens, in); packed: (out, row_bytes); scale, zero: (out, scales); bias: (out) or null; y: (tokens, out); type: of x and y, see floats.h. */
int32_t spikellm_weight_only_linear(const void *x, int64_t tokens, const int32_t *words, const uint8_t *packed, const float *scale, const uint8_t *zero, const float *bias, void *y,
                                    int32_t type, int32_t threads) {
    const Plan plan = read_plan(words);
    const Header *head = &plan.head;
    if (tokens == 0 || head->out == 0) return 0;
    float *placed = calloc((size_t)tokens * (size_t)head->buffer + 1, sizeof *placed), *room = malloc(sizeof(float) * ((size_t)head->in + 1));
    const int32_t failed = !placed || !room, strips = failed ? 0 : (head->out + STRIP - 1) / STRIP;
    for (int64_t n = 0; !failed && n < tokens; n++) place_inputs(&plan, load_row(x, type, n, head->in, room), placed + n * head->buffer);
    free(room);
    const WeightOnly layer = {words, packed, zero, scale, bias, placed, y, tokens, type};
    if (threads > strips) threads = strips;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int32_t strip = 0; strip < strips; strip++) run_strip(&layer, &plan, strip);
    free(placed);
    return failed;
}

static void decode_row(const Plan *plan, const uint8_t *packed, const float *scale, const uint8_t *zero, int64_t row, float *out) {
    const int64_t at = row * plan->head.scales;
    decode(plan->head.bits, plan, packed + row * plan->head.row_bytes, scale ? scale + at : NULL, zero + at, out);
}

/* Rows from `first` on for a matrix product of many tokens: y: (count, buffer), in the order of places; integers alone where `scale` is null. */
int32_t spikellm_weight_only_strip(const int32_t *words, const uint8_t *packed, const float *scale, const uint8_t *zero, int64_t first, int64_t count, float *y, int32_t threads) {
    const Plan plan = read_plan(words);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < count; i++) decode_row(&plan, packed, scale, zero, first + i, y + i * plan.head.buffer);
    return 0;
}

/* Rows that are looked up, as an embedding does: y: (count, in), in the order of channels, of a type of floats.h. Returns 0, 1 where memory ran out, 2 where there is no such row. */
int32_t spikellm_weight_only_rows(const int64_t *rows, int64_t count, const int32_t *words, const uint8_t *packed, const float *scale, const uint8_t *zero, void *y, int32_t type,
                                  int32_t threads) {
    const Plan plan = read_plan(words);
    const Header *head = &plan.head;
    for (int64_t i = 0; i < count; i++)
        if (rows[i] < 0 || rows[i] >= head->out) return 2;
    if (threads > count) threads = (int32_t)count;
    int32_t failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *placed = malloc(sizeof(float) * ((size_t)head->buffer + 1)), *row = malloc(sizeof(float) * ((size_t)head->in + 1));
        const int ready = placed && row;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            if (!ready) continue;
            decode_row(&plan, packed, scale, zero, rows[i], placed);
            for (int32_t c = 0; c < head->in; c++) row[plan.source[c]] = placed[plan.place[c]];
            store_row(y, type, i * head->in, row, head->in);
        }
        free(placed);
        free(row);
    }
    return failed;
}
