/* A spiking linear layer that is trained: the values that its inputs are coded to, and the gradients of inputs and of the shares of ranges. */
#include <stdlib.h>
#include "encode.h"
#include "floats.h"

/* stored: the values of a token in stored order, which may be where they were given. */
typedef struct { float *row, *ordered, *values; uint8_t *codes; Threshold *thresholds; const float *stored; } Room;

static int make_room(const Header *head, Room *room) {
    const size_t in = (size_t)head->in + 1;
    *room = (Room){malloc(sizeof(float) * in), malloc(sizeof(float) * in), malloc(sizeof(float) * in), malloc(in), malloc(sizeof(Threshold) * (size_t)(head->groups + 1)), NULL};
    return room->row && room->ordered && room->values && room->codes && room->thresholds;
}

static void free_room(Room *room) {
    free(room->row);
    free(room->ordered);
    free(room->values);
    free(room->codes);
    free(room->thresholds);
}

/* What the codes of a token stand for, columns in stored order, into `values`. */
static void code_row(const Plan *plan, const void *x, int32_t type, int64_t n, const float *shares, Room *room) {
    room->stored = in_order(plan, load_row(x, type, n, plan->head.in, room->row), room->ordered);
    code_token(plan, room->stored, shares, room->codes, room->thresholds);
    for (int32_t a = 0; a < plan->head.groups; a++) {
        const float theta = room->thresholds[a].theta;
        const int32_t z = room->thresholds[a].baseline;
        for (int32_t i = plan->groups[a].start; i < plan->groups[a].stop; i++) room->values[i] = (float)((int32_t)room->codes[i] - z) * theta;
    }
}

/* Returns 0, or 1 where memory ran out.   x: (tokens, in), in its own order; values: the same, in stored order; shares: one a group, or null; types: of both, see floats.h. */
int32_t spikellm_code_values(const void *x, int64_t tokens, const int32_t *words, const float *shares, void *values, int32_t type, int32_t value_type, int32_t threads) {
    const Plan plan = read_plan(words);
    int32_t failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Room room;
        const int ready = make_room(&plan.head, &room);
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++) {
            if (!ready) continue;
            code_row(&plan, x, type, n, shares, &room);
            store_row(values, value_type, n * plan.head.in, room.values, plan.head.in);
        }
        free_room(&room);
    }
    return failed;
}

/* What a value adds to the gradient of its share, times the share. */
static inline float moved_by(float gradient, float value, float own, float low, float high) { return gradient * (value - (own >= low && own <= high ? own : 0.0f)); }

/* Returns 0, or 1 where memory ran out.   gradient: of the values, (tokens, in), in stored order; by_input: in the order and type of x; by_share: (tokens, groups).

   A value within the part of its range that is coded moves its share by its rounding error, one beyond it by the end it is clipped to. */
int32_t spikellm_code_gradients(const void *x, const void *gradient, int64_t tokens, const int32_t *words, const float *shares, void *by_input, float *by_share, int32_t type,
                                int32_t value_type, int32_t threads) {
    const Plan plan = read_plan(words);
    const int32_t in = plan.head.in;
    int32_t failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Room room;
        float *wide = malloc(sizeof(float) * ((size_t)in + 1)), *moved = malloc(sizeof(float) * ((size_t)in + 1));
        const int ready = make_room(&plan.head, &room) && wide && moved;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++) {
            if (!ready) continue;
            const float *g = load_row(gradient, value_type, n, in, wide);
            for (int32_t i = 0; i < in; i++) moved[plan.source[i]] = g[i];
            code_row(&plan, x, type, n, shares, &room);
            for (int32_t a = 0; a < plan.head.groups; a++) {
                const Group group = plan.groups[a];
                const Range range = plan.ranges[group.range];
                const float share = shares ? shares[a] : group.share;
                float low, high, sums[LANES] = {0}, sum = 0.0f;
                coded_range(room.stored + range.start, range.stop - range.start, share, plan.head.by_mean, range.stop - range.start, &low, &high);
                if (plan.head.mode != ASYMMETRIC) high = high > -low ? high : -low, low = -high;
                int32_t i = group.start;
                for (int32_t at = i; plan.head.stops && at < group.stop; at++)
                    if (!(room.stored[at] >= low && room.stored[at] <= high)) moved[plan.source[at]] = 0.0f;
                for (; i + LANES <= group.stop; i += LANES)
                    for (int lane = 0; lane < LANES; lane++) sums[lane] += moved_by(g[i + lane], room.values[i + lane], room.stored[i + lane], low, high);
                for (; i < group.stop; i++) sums[0] += moved_by(g[i], room.values[i], room.stored[i], low, high);
                for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
                by_share[n * plan.head.groups + a] = sum / share;
            }
            store_row(by_input, type, n * in, moved, in);
        }
        free(wide);
        free(moved);
        free_room(&room);
    }
    return failed;
}
