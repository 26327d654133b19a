/* Products of spike counts and unpacked weights in the processor's tiles (AMX): 32 tokens and 32 rows of weights at a time, 64 columns a step, the same integers as dot_tile. */
#ifndef SPIKELLM_TILES_H
#define SPIKELLM_TILES_H
#include "dot.h"

#define TILE 16   /* rows of a tile, of 64 bytes each */
#define TILED 32  /* tokens and rows of weights */
#define FEWEST 5  /* tokens below which tiles do not pay */

#if defined(__AMX_INT8__)
static inline void open_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } wanted = {.palette = 1};
    for (int i = 0; i < 8; i++) wanted.bytes[i] = BYTES, wanted.rows[i] = TILE;
    _tile_loadconfig(&wanted);
}

static inline void close_tiles(void) { _tile_release(); }

/* 16 rows of 64 bytes, `stride` apart, as a tile multiplies them: words of four bytes by place, each place with all rows. */
static inline void tile_of(const int8_t *rows, int64_t stride, int8_t *tile) {
    __m512i a[TILE], b[TILE];
    UNROLLED for (int i = 0; i < TILE; i++) a[i] = _mm512_loadu_si512(rows + i * stride);
    UNROLLED for (int i = 0; i < TILE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLLED for (int i = 0; i < TILE; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLLED for (int half = 0; half < TILE; half += 8) UNROLLED for (int i = 0; i < 4; i++) {
        b[half + i] = _mm512_shuffle_i32x4(a[half + i], a[half + i + 4], 0x88);
        b[half + i + 4] = _mm512_shuffle_i32x4(a[half + i], a[half + i + 4], 0xdd);
    }
    UNROLLED for (int i = 0; i < 8; i++) {
        const __m512i even = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88), odd = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        _mm512_storeu_si512(tile + i * BYTES, even);
        _mm512_storeu_si512(tile + (i + 8) * BYTES, odd);
    }
}

/* `blocks` steps of 64 columns of 32 rows, `stride` apart: two tiles a step. */
static inline void tiles_of_strip(const int8_t *rows, int64_t stride, int32_t blocks, int8_t *tiles) {
    for (int32_t b = 0; b < blocks; b++, rows += BYTES, tiles += TILED * BYTES) {
        tile_of(rows, stride, tiles);
        tile_of(rows + TILE * stride, stride, tiles + TILE * BYTES);
    }
}

/* Sums of up to 32 tokens, whose counts stand `between` bytes apart: (tokens, rows); of the first 16 alone where there are no more. */
static inline void sums_of_tiles(const uint8_t *counts, int64_t between, int32_t tokens, const int8_t *tiles, int32_t blocks, int32_t *sums) {
    const int both = tokens > TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int32_t b = 0; b < blocks; b++, counts += BYTES, tiles += TILED * BYTES) {
        _tile_loadd(4, counts, between);
        _tile_loadd(6, tiles, BYTES);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, tiles + TILE * BYTES, BYTES);
        _tile_dpbusd(1, 4, 7);
        if (!both) continue;
        _tile_loadd(5, counts + TILE * between, between);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums, TILED * sizeof(int32_t));
    _tile_stored(1, sums + TILE, TILED * sizeof(int32_t));
    if (!both) return;
    _tile_stored(2, sums + TILE * TILED, TILED * sizeof(int32_t));
    _tile_stored(3, sums + TILE * TILED + TILE, TILED * sizeof(int32_t));
}
#else
static inline void open_tiles(void) {}
static inline void close_tiles(void) {}
#endif
#endif
