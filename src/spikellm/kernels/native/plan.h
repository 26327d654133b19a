/* What a call of spike_linear needs to know of a layer, as one array of 32-bit integers; made by linear_plan.py, which says the same in Python.

   header, then for each activation group: first and last stored column, largest code, range, share of it (a float), θ (a float) and z where they are constants; for each range: first and last stored column; for each segment: first and
   last stored column, activation group, weight group, where its spikes stand in the buffer, first block of the packed row, blocks; then for each stored column the
   channel it comes from, and where its spike count stands in the buffer; then what price.h says.

   A block is what 64 bytes of a packed row hold (24 bytes where codes have 3 bits, 64 columns where they are unpacked one by one). Spike counts of a block stand in the order
   in which shifting and masking its bytes gives the weights; columns of other segments are zero there. */
#ifndef SPIKELLM_PLAN_H
#define SPIKELLM_PLAN_H
#include "price.h"

enum { ASYMMETRIC = 0, SYMMETRIC = 1, SIGNED = 2 };

typedef struct {
    int32_t in, out, bits, mode, groups, ranges, segments, buffer, row_bytes, scales, block, by_mean, stops, massive_top, fixed;
    /* by_mean: thresholds follow mean magnitudes; stops: gradients end at the ends of what is coded; fixed: thresholds are constants */
    float massive_beyond; /* width of a token's range beyond which its codes reach massive_top, which is 0 where no token's do */
    PriceHeader price;
} Header;

typedef struct {
    int32_t start, stop, top, range;
    float share, theta; /* share: part of its range that is coded */
    int32_t baseline;
} Group;
typedef struct { int32_t start, stop; } Range;
typedef struct { int32_t start, stop, group, weight_group, offset, first_block, blocks; } Segment;

typedef struct {
    Header head;
    const Group *groups;
    const Range *ranges;
    const Segment *segments;
    const int32_t *source, *place;
    Price price;
} Plan;

static inline Plan read_plan(const int32_t *words) {
    Plan plan;
    plan.head = *(const Header *)words;
    words += sizeof(Header) / sizeof(int32_t);
    plan.groups = (const Group *)words;
    words += plan.head.groups * (int32_t)(sizeof(Group) / sizeof(int32_t));
    plan.ranges = (const Range *)words;
    words += plan.head.ranges * (int32_t)(sizeof(Range) / sizeof(int32_t));
    plan.segments = (const Segment *)words;
    words += plan.head.segments * (int32_t)(sizeof(Segment) / sizeof(int32_t));
    plan.source = words;
    plan.place = words + plan.head.in;
    plan.price = read_price(&plan.head.price, plan.place + plan.head.in);
    return plan;
}
#endif
