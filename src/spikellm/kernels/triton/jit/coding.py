"""Inputs become spike counts: range, threshold, rounding and placing of a token in one program.

Every operation on floats is the one of :mod:`spikellm.quantization.thresholds` and of the neurons,
in the same order, so that θ, z and counts have the same bits. Divisions are rounded to nearest
(``div_rn``); products and sums must not be fused (``enable_fp_fusion=False`` at the launch).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half_up(v):
    """``floor(v + 1/2)`` for |v| < 2²², without the rounding of that sum."""
    n = (v + 12582912.0) - 12582912.0
    return n + tl.where(v - n == 0.5, 1.0, 0.0)


@triton.jit
def range_of(x, order, first, last, BLOCK: tl.constexpr):
    """Smallest and largest of stored columns, zero included, and a number that is 0 if all are
    finite, else NaN.
    """
    low, high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    finite = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        channel = tl.load(order + column, mask=inside, other=0)
        value = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
        low, high, finite = tl.minimum(low, value), tl.maximum(high, value), finite + value * 0.0
    return tl.min(low, 0), tl.max(high, 0), tl.sum(finite, 0)


@triton.jit
def threshold_of(low, high, finite, top, MODE: tl.constexpr):
    """θ, NaN where the range is not finite, and z as a float; MODE 0 asymmetric, 1 symmetric, 2 of
    signed neurons, whose baseline is not looked at.
    """
    if MODE == 0:
        theta = tl.div_rn(high, top) - tl.div_rn(low, top)
        units = tl.div_rn(-low, theta)
        known = (finite == finite) & (units == units) & (units < float("inf"))
        baseline = tl.where(known, tl.minimum(half_up(tl.minimum(units, 1.0e5)), top), 0.0)
    else:
        baseline = tl.floor(top * 0.5)
        parts = baseline
        if MODE == 2:
            parts = top
        theta = tl.div_rn(tl.maximum(high, -low), parts)
    theta = tl.where(theta < 1.1754943508222875e-38, 1.0, theta)
    return tl.where((finite != finite) | (theta == float("inf")), float("nan"), theta), baseline


@triton.jit
def code_inputs(
    x,
    order,
    source,
    groups,
    shares,
    segments,
    counts,
    thetas,
    baselines,
    totals,
    columns,
    width,
    group_count,
    segment_count,
    massive_beyond,
    massive_top,
    lift,
    HAS_MASSIVE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a program.

    x ``(tokens, columns)``; order: channel of every stored column; source: channel of every place,
    -1 where none stands; groups ``(group_count, 5)``: top, first and last stored column of its
    range, first and last segment; shares: part of the range that a group codes; segments
    ``(segment_count, 6)``: group, weight group, first place, first block, places, block behind its
    last. Written: counts less ``lift``, int8 ``(tokens, width)``; θ and z ``(tokens,
    group_count)``; sums of counts ``(tokens, segment_count)``.
    """
    token = tl.program_id(0).to(tl.int64)
    x += token * columns
    if HAS_MASSIVE:
        low, high, finite = range_of(x, order, 0, columns, BLOCK)
        reach = high - low
        massive = (finite == finite) & (reach > massive_beyond) & (reach < float("inf"))
    for group in range(group_count):
        own = groups + 5 * group
        top = tl.load(own).to(tl.float32)
        raised = top
        if HAS_MASSIVE:
            raised = massive_top * 1.0
            top = tl.where(massive, raised, top)
        low, high, finite = range_of(x, order, tl.load(own + 1), tl.load(own + 2), BLOCK)
        share = tl.load(shares + group)
        theta, baseline = threshold_of(low * share, high * share, finite, top, MODE)
        tl.store(thetas + token * group_count + group, theta)
        lowest, highest = 0.0, top
        if MODE == 2:
            baseline, lowest, highest = raised, raised - top, raised + top
        tl.store(baselines + token * group_count + group, baseline.to(tl.int32))
        for segment in range(tl.load(own + 3), tl.load(own + 4)):
            place = segments + 6 * segment
            first = tl.load(place + 2)
            last = first + tl.load(place + 4)
            total = tl.zeros((BLOCK,), tl.int32)
            for start in range(first, last, BLOCK):
                at = start + tl.arange(0, BLOCK)
                inside = at < last
                channel = tl.load(source + at, mask=inside, other=-1)
                stands = channel >= 0
                value = tl.load(x + channel, mask=stands, other=0.0).to(tl.float32)
                units = tl.div_rn(value, theta)
                units = tl.where(units == units, units, 0.0)
                units = tl.minimum(tl.maximum(units, -1.0e5), 1.0e5)
                if MODE == 2:
                    size = tl.minimum(half_up(tl.abs(units)), top)
                    code = tl.where(units < 0.0, -size, size) + baseline
                else:
                    code = half_up(units) + baseline
                code = tl.minimum(tl.maximum(code, lowest), highest).to(tl.int32)
                code = tl.where(stands, code, 0)
                total += code
                tl.store(counts + token * width + at, (code - lift).to(tl.int8), mask=inside)
            tl.store(totals + token * segment_count + segment, tl.sum(total, 0))
