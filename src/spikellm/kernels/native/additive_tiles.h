/* Many tokens of an additive layer in the processor's tiles of bfloat16 (AMX): digits of all planes are added up into tiles once for all tokens, and sums stay those of additive.h up to
   their order. Inputs of 32 bits are cut into three parts of 8 significant bits, so that nothing of normal
   numbers is lost.

   A word's 18 columns are 9 pairs of a tile; a segment's pairs are cut into tiles of as many rows as leave fewest empty. */
#ifndef SPIKELLM_ADDITIVE_TILES_H
#define SPIKELLM_ADDITIVE_TILES_H
#include "additive.h"

#define MOST_ADDED 16 /* tokens up to which each is added up for itself, as decode steps do */

#if defined(__AMX_BF16__)
#define SIDE 16       /* tokens, outputs, and at most pairs of a tile */
#define PAIRS 9       /* of a word */
#define PANEL 512     /* tokens at most whose sums are held at a time; fewer where their inputs would fill a cache */
#define LEAST_PANEL 128
#define PANEL_BYTES (1 << 21)
#define TILE_WORDS (SIDE * SIDE)
#define BLOCK_TILES (OUTPUTS / SIDE)
#define CHUNK 2       /* words a row of a tile that become tiles at a time: whole tiles of pairs, of which those of 32 outputs stay in the first cache */

/* How inputs stand: those of 16 tokens side by side, `width` pairs of each; of every segment its parts one after the other, of each whole tiles of `rows` pairs, token by token. */
typedef struct { int32_t rows, parts; int64_t width; } Places;

static inline int32_t tiles_for(int32_t words, int32_t rows) { return (words * PAIRS + rows - 1) / rows; }

static inline Places places_of(const Additive *layer, int32_t parts) {
    Places best = {SIDE, parts, INT64_MAX};
    for (int32_t rows = SIDE; rows >= PAIRS; rows--) {
        int64_t width = 0;
        for (int32_t s = 0; s < layer->head->segments; s++) width += (int64_t)tiles_for(layer->segments[s].plane_words, rows) * rows * parts;
        const int64_t tiles = width / rows, fewest = best.width == INT64_MAX ? INT64_MAX : best.width / best.rows;
        if (tiles < fewest || (tiles == fewest && rows < best.rows)) best = (Places){rows, parts, width};
    }
    return best;
}

/* The upper halves of floats, which keep the rest. */
static inline void cut_part(float *left, int32_t count, uint16_t *part) {
    for (int32_t i = 0; i < count; i++) {
        uint32_t bits;
        float upper;
        memcpy(&bits, left + i, sizeof bits);
        part[i] = (uint16_t)(bits >> 16);
        bits &= 0xffff0000u;
        memcpy(&upper, &bits, sizeof upper);
        left[i] -= upper;
    }
}

/* Inputs of a token into the row that it has in the tiles of its 16, which are zero before; parts are cut off, not rounded, so that they add up to the input. */
static inline void place_parts(const Additive *layer, const Places *places, const float *x, uint16_t *tiles) {
    const int32_t row = places->rows * 2, tile = row * SIDE;
    for (int32_t s = 0; s < layer->head->segments; s++) {
        const AdditiveSegment *segment = &layer->segments[s];
        const int64_t apart = (int64_t)tiles_for(segment->plane_words, places->rows) * tile;
        for (int32_t c = segment->start; c < segment->stop; c += row) {
            const int32_t count = segment->stop - c < row ? segment->stop - c : row;
            uint16_t *place = tiles + (c - segment->start) / row * tile;
            float left[2 * SIDE] = {0};
            for (int32_t i = 0; i < count; i++) left[i] = x[layer->source[c + i]];
            for (int32_t p = 0; p < places->parts; p++, place += apart) cut_part(left, count, place);
        }
        tiles += apart * places->parts;
    }
}

/* What a combination of three digits is as pairs of bfloat16: its first two, its last as the lower half, its first as the upper half, its last two. */
typedef struct { __m512i first[2], low[2], high[2], last[2]; } Digits;

static inline void make_digits(Digits *digits) {
    const uint32_t value[3] = {0xbf80u, 0, 0x3f80u};
    uint32_t table[4][ENTRIES] = {{0}};
    for (int e = 0; e < 27; e++) {
        const uint32_t a = value[e % 3], b = value[e / 3 % 3], c = value[e / 9];
        table[0][e] = a | b << 16;
        table[1][e] = c;
        table[2][e] = a << 16;
        table[3][e] = b | c << 16;
    }
    memcpy(digits->first, table[0], sizeof table[0]);
    memcpy(digits->low, table[1], sizeof table[1]);
    memcpy(digits->high, table[2], sizeof table[2]);
    memcpy(digits->last, table[3], sizeof table[3]);
}

static inline __m512i pairs_of(const __m512i *table, __m512i index) { return _mm512_permutex2var_epi32(table[0], index, table[1]); }

/* Sums of pairs of whole numbers that bfloat16 holds. */
static inline __m512i sum_of_pairs(__m512i a, __m512i b) {
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000u);
    const __m512 high = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(a, upper)), _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
    const __m512 low = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
    return _mm512_or_si512(_mm512_and_si512(_mm512_castps_si512(high), upper), _mm512_srli_epi32(_mm512_castps_si512(low), 16));
}

/* Words of a plane of a block as tiles, the first, or added to those of the planes before: of every `rows` pairs four tiles of 16 outputs; the last are filled up with zeros. */
static inline void tiles_of_words(const uint32_t *words, int32_t count, int32_t rows, int first, uint32_t *tiles) {
    Digits digits;
    make_digits(&digits);
    int32_t row = 0;
    uint32_t *tile = tiles;
    for (int32_t w = 0; w < count; w++, words += OUTPUTS) {
        __m512i pairs[BLOCK_TILES][PAIRS];
        for (int j = 0; j < BLOCK_TILES; j++) {
            const __m512i own = _mm512_loadu_si512(words + SIDE * j);
            for (int t = 0; t < TRIPLES; t += 2) {
                const __m512i even = _mm512_srlv_epi32(own, _mm512_set1_epi32(5 * t)), odd = _mm512_srlv_epi32(own, _mm512_set1_epi32(5 * t + 5));
                pairs[j][t / 2 * 3] = pairs_of(digits.first, even);
                pairs[j][t / 2 * 3 + 1] = _mm512_or_si512(pairs_of(digits.low, even), pairs_of(digits.high, odd));
                pairs[j][t / 2 * 3 + 2] = pairs_of(digits.last, odd);
            }
        }
        for (int p = 0; p < PAIRS; p++) {
            for (int j = 0; j < BLOCK_TILES; j++) {
                uint32_t *place = tile + j * TILE_WORDS + row * SIDE;
                _mm512_storeu_si512(place, first ? pairs[j][p] : sum_of_pairs(pairs[j][p], _mm512_loadu_si512(place)));
            }
            if (++row == rows) row = 0, tile += BLOCK_TILES * TILE_WORDS;
        }
    }
    for (; row > 0 && row < rows; row++)
        for (int j = 0; j < BLOCK_TILES; j++) memset(tile + j * TILE_WORDS + row * SIDE, 0, sizeof(uint32_t) * SIDE);
}

static inline void open_pairs(int32_t rows) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } wanted = {.palette = 1};
    for (int i = 0; i < 4; i++) wanted.bytes[i] = 64, wanted.rows[i] = SIDE;                             /* sums */
    for (int i = 4; i < 6; i++) wanted.bytes[i] = (uint16_t)(rows * 4), wanted.rows[i] = SIDE;           /* tokens */
    for (int i = 6; i < 8; i++) wanted.bytes[i] = 64, wanted.rows[i] = (uint8_t)rows;                    /* outputs */
    _tile_loadconfig(&wanted);
}

/* Adds `count` tiles a part to sums (to nothing where they begin) of 32 tokens (of 16 where `both` is not) and 32 outputs: (tokens, 64). `x`: their tiles of the first part, `apart` pairs before
   those of the next. */
static inline void add_tiles(int begins, const uint32_t *x, const Places *places, int64_t apart, const uint32_t *tiles, int32_t count, int both, float *sums) {
    const size_t stride = (size_t)places->rows * sizeof *x, between = OUTPUTS * sizeof *sums;
    if (begins) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, between);
        _tile_loadd(1, sums + SIDE, between);
    }
    if (both && !begins) {
        _tile_loadd(2, sums + SIDE * OUTPUTS, between);
        _tile_loadd(3, sums + SIDE * OUTPUTS + SIDE, between);
    }
    for (int32_t k = 0; k < count; k++, x += SIDE * places->rows, tiles += BLOCK_TILES * TILE_WORDS) {
        _tile_loadd(6, tiles, 64);
        _tile_loadd(7, tiles + TILE_WORDS, 64);
        for (int32_t p = 0; p < places->parts; p++) {
            _tile_loadd(4, x + p * apart, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (!both) continue;
            _tile_loadd(5, x + p * apart + SIDE * places->width, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, between);
    _tile_stored(1, sums + SIDE, between);
    if (!both) return;
    _tile_stored(2, sums + SIDE * OUTPUTS, between);
    _tile_stored(3, sums + SIDE * OUTPUTS + SIDE, between);
}

/* Bytes of scratch that a block takes: tiles, sums, totals. */
#define TILE_SCRATCH (sizeof(uint32_t) * TILE_WORDS * BLOCK_TILES * CHUNK * PAIRS + 2 * sizeof(float) * PANEL * OUTPUTS)

/* A block of outputs of up to PANEL tokens, whose inputs stand in `placed` in whole tiles of tokens, into y at element `at` of the first token's first output. */
static inline void run_panel(const Additive *layer, const Places *places, int32_t block, const uint32_t *placed, int32_t tokens, uint32_t *scratch, void *y, int32_t type, int64_t at) {
    const AdditiveHeader *head = layer->head;
    const int32_t first = block * OUTPUTS, count = head->out - first < OUTPUTS ? head->out - first : OUTPUTS, chunk = places->rows * CHUNK;
    const uint32_t *own = layer->words + (int64_t)block * head->words * OUTPUTS;
    float *sums = (float *)scratch, *totals = sums + PANEL * OUTPUTS;
    uint32_t *tiles = (uint32_t *)(totals + PANEL * OUTPUTS);
    memset(totals, 0, sizeof *totals * (size_t)tokens * OUTPUTS);
    for (int32_t s = 0; s < head->segments; s++) {
        const AdditiveSegment *part = &layer->segments[s];
        const int64_t apart = (int64_t)tiles_for(part->plane_words, places->rows) * places->rows * SIDE;
        if (part->planes == 0) { /* nothing was summed */
            placed += apart * places->parts;
            continue;
        }
        for (int32_t w = 0; w < part->plane_words; w += chunk) {
            const int32_t some = part->plane_words - w < chunk ? part->plane_words - w : chunk;
            for (int32_t t = 0; t < part->planes; t++)
                tiles_of_words(own + ((int64_t)part->first_word + (int64_t)t * part->plane_words + w) * OUTPUTS, some, places->rows, t == 0, tiles);
            for (int32_t o = 0; o < OUTPUTS; o += 2 * SIDE)
                for (int32_t n = 0; n < tokens; n += 2 * SIDE)
                    add_tiles(w == 0, placed + (int64_t)n * places->width + (int64_t)w * PAIRS * SIDE, places, apart, tiles + o / SIDE * TILE_WORDS,
                              tiles_for(some, places->rows), tokens - n > SIDE, sums + n * OUTPUTS + o);
        }
        float scale[OUTPUTS] = {0};
        for (int32_t o = 0; o < count; o++) scale[o] = layer->scale[(int64_t)(first + o) * head->scales + part->weight_group];
        for (int32_t n = 0; n < tokens; n++)
            for (int32_t o = 0; o < OUTPUTS; o++) totals[n * OUTPUTS + o] += sums[n * OUTPUTS + o] * scale[o];
        placed += apart * places->parts;
    }
    for (int32_t n = 0; n < tokens; n++) {
        float *total = totals + n * OUTPUTS;
        for (int32_t o = 0; o < count; o++) total[o] = total[o] + (layer->bias ? layer->bias[first + o] : 0.0f);
        store_row(y, type, at + (int64_t)n * head->out + first, total, count);
    }
}

/* The whole layer; returns 0, or 1 where memory ran out. */
static inline int32_t run_in_tiles(const Additive *layer, const void *x, int64_t tokens, void *y, int32_t type, int32_t threads) {
    const Places places = places_of(layer, type == BFLOAT16 ? 1 : 3);
    const int64_t pair_rows = PANEL_BYTES / (int64_t)sizeof(uint32_t) / (places.width + 1) / SIDE * SIDE, fits = pair_rows < LEAST_PANEL ? LEAST_PANEL : pair_rows > PANEL ? PANEL : pair_rows;
    const int64_t panel = tokens < fits ? (tokens + SIDE - 1) / SIDE * SIDE : fits;
    uint32_t *placed = aligned_alloc(64, (sizeof *placed * (size_t)(panel * places.width) + 64) / 64 * 64);
    float *room = malloc(sizeof(float) * ((size_t)layer->head->in + 1));
    int32_t failed = !placed || !room;
    for (int64_t first = 0; first < tokens && !failed; first += panel) {
        const int32_t some = (int32_t)(tokens - first < panel ? tokens - first : panel);
        memset(placed, 0, sizeof *placed * (size_t)(panel * places.width));
        for (int32_t n = 0; n < some; n++)
            place_parts(layer, &places, load_row(x, type, first + n, layer->head->in, room), (uint16_t *)(placed + n / SIDE * SIDE * places.width + n % SIDE * places.rows));
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            uint32_t *scratch = aligned_alloc(64, TILE_SCRATCH);
            if (!scratch) {
#pragma omp atomic write
                failed = 1;
            }
            if (scratch) open_pairs(places.rows);
#pragma omp for schedule(static)
            for (int32_t block = 0; block < blocks_of(layer); block++)
                if (scratch) run_panel(layer, &places, block, placed, some, scratch, y, type, first * layer->head->out);
            if (scratch) _tile_release();
            free(scratch);
        }
    }
    free(placed);
    free(room);
    return failed;
}
#endif
#endif
