"""Products with packed weight codes, which are unpacked in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_of(weights, rows, row_bytes, row_count, block, field, BITS: tl.constexpr):
    """Codes of a block of 64 bytes (2, 4 and 8 bits: one field of them) or of 64 columns (others),
    int32 ``(rows, 64)``; 0 beyond the end of a row.
    """
    lane = tl.arange(0, 64)
    there = (rows < row_count)[:, None]
    line = weights + rows.to(tl.int64)[:, None] * row_bytes
    if BITS == 2 or BITS == 4 or BITS == 8:
        byte = (block * 64 + lane)[None, :]
        packed = tl.load(line + byte, mask=there & (byte < row_bytes), other=0).to(tl.int32)
        return (packed >> (field * BITS)) & ((1 << BITS) - 1)
    bit = (block * 64 + lane) * BITS
    byte, shift = (bit >> 3)[None, :], (bit & 7)[None, :]
    low = tl.load(line + byte, mask=there & (byte < row_bytes), other=0).to(tl.int32)
    high = tl.load(line + byte + 1, mask=there & (byte + 1 < row_bytes), other=0).to(tl.int32)
    return ((low | (high << 8)) >> shift) & ((1 << BITS) - 1)


@triton.jit
def spike_product(
    counts,
    thetas,
    baselines,
    totals,
    weights,
    scales,
    zeros,
    lifted,
    column_sums,
    bias,
    segments,
    y,
    tokens,
    rows,
    width,
    row_bytes,
    group_count,
    segment_count,
    scale_count,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIFT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """``y[n, o] = Σ_segments (Σ_c q·k − z·Σ_c k)·θ·s (+ bias)``, segments in order.

    Weight codes of 8 bits are taken less 128, and counts less what they were lowered by, so that
    both are signed bytes; lifted ``(segments, rows)`` holds what the latter takes from sums. zeros
    ``(rows, scale_count)``, column_sums ``(segments, rows)``: Σ (code − zero).
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present, there = token < tokens, row < rows
    lane = tl.arange(0, 64)
    lower = 128 if BITS == 8 else 0
    found = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
    for segment in range(segment_count):
        own = segments + 6 * segment
        group, weight_group = tl.load(own), tl.load(own + 1)
        sums = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.int32)
        line = counts + token.to(tl.int64)[:, None] * width + tl.load(own + 2)
        for block in range(tl.load(own + 3), tl.load(own + 5)):
            for field in tl.static_range(FIELDS):
                code = codes_of(weights, row, row_bytes, rows, block, field, BITS) - lower
                spikes = tl.load(line + lane[None, :], mask=present[:, None], other=0)
                sums += tl.dot(spikes, tl.trans(code.to(tl.int8)), out_dtype=tl.int32)
                line += 64
        theta = tl.load(thetas + token * group_count + group, mask=present, other=0.0)
        baseline = tl.load(baselines + token * group_count + group, mask=present, other=0)
        total = tl.load(totals + token * segment_count + segment, mask=present, other=0)
        scale = tl.load(scales + row * scale_count + weight_group, mask=there, other=0.0)
        zero = tl.load(zeros + row * scale_count + weight_group, mask=there, other=0).to(tl.int32)
        column = tl.load(column_sums + segment * rows + row, mask=there, other=0)
        charge = sums + total[:, None] * (lower - zero)[None, :]
        if HAS_LIFT:
            charge += tl.load(lifted + segment * rows + row, mask=there, other=0)[None, :]
        charge -= baseline[:, None] * column[None, :]
        found += charge.to(tl.float32) * theta[:, None] * scale[None, :]
    if HAS_BIAS:
        found += tl.load(bias + row, mask=there, other=0.0)[None, :]
    at = y + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(at, found.to(y.dtype.element_ty), mask=present[:, None] & there[None, :])


@triton.jit
def weight_product(
    x,
    source,
    weights,
    scales,
    zeros,
    bias,
    segments,
    y,
    tokens,
    rows,
    columns,
    row_bytes,
    segment_count,
    scale_count,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDITIVE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """``y[n, o] = Σ_segments s · Σ_c x·(code − zero) (+ bias)`` of inputs that are not coded.

    Integers of up to 8 bits are exact in the type of x, and so is a product of two such numbers in
    float32, in which they are summed. ADDITIVE: weights are −1, 0 and 1, and inputs are added and
    subtracted, a token a program.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present, there = token < tokens, row < rows
    lane = tl.arange(0, 64)
    found = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
    for segment in range(segment_count):
        own = segments + 6 * segment
        weight_group, place = tl.load(own + 1), tl.load(own + 2)
        scale = tl.load(scales + row * scale_count + weight_group, mask=there, other=0.0)
        zero = tl.load(zeros + row * scale_count + weight_group, mask=there, other=0).to(tl.int32)
        sums = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
        for block in range(tl.load(own + 3), tl.load(own + 5)):
            for field in tl.static_range(FIELDS):
                weight = codes_of(weights, row, row_bytes, rows, block, field, BITS)
                weight = weight - zero[:, None]
                channel = tl.load(source + place + lane)
                stands = (channel >= 0)[None, :]
                at = x + token.to(tl.int64)[:, None] * columns + channel[None, :]
                value = tl.load(at, mask=present[:, None] & stands, other=0.0)
                if ADDITIVE:
                    wide = value.to(tl.float32)
                    chosen = tl.where(weight > 0, wide, tl.where(weight < 0, -wide, 0.0))
                    sums += tl.sum(chosen, 1)[None, :]
                else:
                    turned = tl.trans(weight.to(value.dtype))
                    sums += tl.dot(value, turned, input_precision="ieee")
                place += 64
        found += sums * scale[None, :]
    if HAS_BIAS:
        found += tl.load(bias + row, mask=there, other=0.0)[None, :]
    at = y + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(at, found.to(y.dtype.element_ty), mask=present[:, None] & there[None, :])
