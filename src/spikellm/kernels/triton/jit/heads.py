"""Coding of attention heads: one token and head a program. Every operation on floats is the one of
:mod:`spikellm.kernels.torch.heads`, in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikellm.kernels.triton.jit.coding import half_up, threshold_of


@triton.jit
def head_threshold(x, share, top, MODE: tl.constexpr):
    """θ, the smallest bfloat16 that is not below it, and z of one range; others' channels are 0."""
    low = tl.minimum(tl.min(x, 0), 0.0) * share
    high = tl.maximum(tl.max(x, 0), 0.0) * share
    finite = tl.sum(x * 0.0, 0)
    theta, baseline = threshold_of(low, high, finite, top, MODE)
    bits = theta.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0xFFFF) != 0, (bits & -65536) + 65536, bits)
    theta = bits.to(tl.float32, bitcast=True)
    if MODE == 0:
        units = tl.div_rn(-low, theta)
        units = tl.where((finite == finite) & (units == units), units, 0.0)
        units = tl.minimum(tl.maximum(units, -1.0e5), 1.0e5)
        baseline = tl.minimum(tl.maximum(half_up(units), 0.0), top)
    if MODE == 2:
        baseline = baseline * 0.0
    return theta, baseline


@triton.jit
def code_heads(
    x,
    ranges,
    tops,
    fineness,
    values,
    codes,
    thetas,
    baselines,
    heads,
    tokens,
    channels,
    plan_heads,
    share,
    top,
    RANGES: tl.constexpr,
    MODE: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x float32 ``(batch, heads, tokens, channels)``; ranges, tops, fineness ``(plan heads,
    channels)``: range, largest code and steps over ordinary ones of every channel. Written: values,
    like x, or codes (uint8, signed ones raised by their top) and θ and z, ``(…, RANGES)``.
    """
    row = tl.program_id(0).to(tl.int64)
    head = (row // tokens) % heads
    plan = tl.where(plan_heads > 1, head, 0) * channels
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    value = tl.load(x + row * channels + channel, mask=inside, other=0.0)
    own_range = tl.load(ranges + plan + channel, mask=inside, other=0)
    most = tl.load(tops + plan + channel, mask=inside, other=0).to(tl.float32)
    fine = tl.load(fineness + plan + channel, mask=inside, other=1.0)
    if RANGES == 1:
        theta, baseline = head_threshold(value, share, top, MODE)
        tl.store(thetas + row, theta)
        tl.store(baselines + row, baseline)
        own_theta, own_baseline = theta + fine * 0.0, baseline + fine * 0.0
    else:
        first = tl.where(own_range == 0, 1.0, 0.0)
        second = 1.0 - first
        theta, baseline = head_threshold(value * first, share, top, MODE)
        # zeros beyond the last channel belong to no range, and change none
        other, under = head_threshold(value * second, share, top, MODE)
        tl.store(thetas + 2 * row, theta)
        tl.store(thetas + 2 * row + 1, other)
        tl.store(baselines + 2 * row, baseline)
        tl.store(baselines + 2 * row + 1, under)
        own_theta = theta * first + other * second
        own_baseline = baseline * first + under * second
    own_theta, own_baseline = tl.div_rn(own_theta, fine), own_baseline * fine
    units = tl.div_rn(value, own_theta)
    units = tl.where(units == units, units, 0.0)
    if MODE == 2:
        size = tl.minimum(half_up(tl.abs(units)), most)
        code = tl.where(units < 0.0, -size, size)
    else:
        code = tl.minimum(tl.maximum(half_up(units) + own_baseline, 0.0), most)
    at = row * channels + channel
    if VALUES:
        tl.store(values + at, own_theta * (code - own_baseline), mask=inside)
    else:
        if MODE == 2:
            code += most
        tl.store(codes + at, code.to(tl.int32).to(tl.uint8), mask=inside)
