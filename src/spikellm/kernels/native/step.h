/* A pass of a few tokens through a whole decoder, as a list of operations on numbered places; made by step_plan.py, which says the same in Python.

   A place is a matrix with a row for every token, all of them in one arena of floats: values of the model's type, widened. Every operation rounds its results to that type
   where the model library's own does. */
#ifndef SPIKELLM_STEP_H
#define SPIKELLM_STEP_H
#include <stdint.h>

enum { NORM, LINEAR, ADDITIVE, DENSE, WEIGHT_ONLY, ROTATE, ROPE, SCALE, ATTEND, ACTIVATE, ADD };
enum { RMS, RMS_WIDE, LAYER_NORM };       /* times the weight after rounding, or before it; with a mean and a bias */
enum { SILU, GELU, GELU_TANH, GELU_STEPS, RELU }; /* GELU_STEPS: by one operator after the other, each rounded */

/* Columns of a place: of a row `stride` floats long, heads · size values, one head `apart` floats behind the other. `at`: floats a token that stand before the place. */
typedef struct { int64_t at; int32_t stride, first, heads, apart, size, unused; } View;

/* See step.c for what each kind makes of its fields. */
typedef struct {
    int32_t kind, in, other, out; /* views, -1 for none */
    int32_t a, b, c, d;
    float x, y;
    const void *data[6];
} Op;

/* Cached keys and values of a layer: rows of bytes or of numbers, head by head. Of its `room` rows of a head `first` to `first + past` are held; of all `total` tokens that came
   the last `keep` stay, all where that is 0. */
typedef struct { int64_t keys, values, key_head, value_head, room, first, past, total, keep; } Cached; /* addresses; bytes from one head to the next; rows */

/* Attention of a layer. Plans are null where nothing is coded. */
typedef struct {
    int32_t heads, kv_heads, key_size, value_size, layer, window, value, centered; /* value: its view */
    int32_t balanced, rotated, type, unused;
    float scaling, softcap;
    const int32_t *query_plan, *key_plan, *value_plan;
    const float *mean, *key_map, *query_map, *signs, *center;
} Attention;

typedef struct {
    const View *views;
    const Op *ops;
    int64_t count, floats; /* operations; floats a token of the arena */
    int32_t type, lanes;   /* of the model's numbers; of torch's vectors */
} Program;

typedef struct {
    int64_t batch, queries, first, last; /* sequences, tokens of each; operations that are run */
    int64_t apart;                       /* layers of each sequence's own cache; 0 where one cache holds all sequences */
    const float *input;                  /* (tokens, columns) of view 0 */
    void *output;                        /* what view `result` holds at the end, in the model's type */
    Cached **cached;                     /* of every layer; of the next sequence `apart` further, where that is not 0 */
    const float *const *cos, *const *sin; /* of every table, a row for every position */
    const int64_t *positions;            /* of every token */
    const int64_t *mask;                 /* (batch, mask_tokens), zero for padding; null where there is none */
    int64_t mask_tokens;
    float *seen;         /* inputs and outputs of linear layers one after the other, or null */
    const float *forced; /* outputs that take the place of theirs, or null */
    int32_t threads, commit, result, unused; /* commit: new tokens are held afterwards */
} Call;

int32_t spikellm_step(const Program *program, const Call *call);
#endif
