"""Attention over packed rows of a cache: codes are unpacked in registers, some tokens at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def values_of_rows(
    rows,
    token,
    tokens,
    places,
    place,
    inside,
    row_bytes,
    codes_bytes,
    top,
    RANGES: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Values of some tokens of one head, float32 ``(tokens, places)``, 0 where there are none.

    places: int32, of every stored place its first bit, its bits, its range, and the bits of its
    fineness, a float: ``(4, channels)`` with a stride of ``place``'s length, from the head on.
    """
    line = rows + token.to(tl.int64)[:, None] * row_bytes
    there = (token < tokens)[:, None] & inside[None, :]
    stride = place.shape[0]
    first = tl.load(places + place, mask=inside, other=0)
    bits = tl.load(places + stride + place, mask=inside, other=1)
    own = tl.load(places + 2 * stride + place, mask=inside, other=0)
    fine = tl.load(places + 3 * stride + place, mask=inside, other=1065353216)
    fine = fine.to(tl.float32, bitcast=True)
    byte = (first >> 3)[None, :]
    low = tl.load(line + byte, mask=there, other=0).to(tl.int32)
    high = tl.load(line + byte + 1, mask=there & (byte + 1 < row_bytes), other=0).to(tl.int32)
    code = ((low | (high << 8)) >> (first & 7)[None, :]) & ((1 << bits) - 1)[None, :]
    present = token < tokens
    theta = tl.zeros(code.shape, tl.float32)
    baseline = tl.zeros(code.shape, tl.float32)
    for group in tl.static_range(RANGES):
        at = rows + token.to(tl.int64) * row_bytes + codes_bytes + 2 * group
        word = tl.load(at, mask=present, other=0).to(tl.int32) << 16
        word |= tl.load(at + 1, mask=present, other=0).to(tl.int32) << 24
        found = word.to(tl.float32, bitcast=True)
        under = rows + (token.to(tl.int64) + 1) * row_bytes - RANGES + group
        zero = tl.load(under, mask=present, other=0).to(tl.float32)
        if SIGNED:
            zero = zero * 0.0 + top
        chosen = (own == group)[None, :]
        theta = tl.where(chosen, found[:, None], theta)
        baseline = tl.where(chosen, zero[:, None], baseline)
    fine = fine[None, :]
    value = tl.div_rn(theta, fine + theta * 0.0) * (code.to(tl.float32) - baseline * fine)
    return tl.where(there, value, 0.0)


@triton.jit
def key_scores(
    query,
    rows,
    order,
    places,
    scores,
    heads,
    own_heads,
    queries,
    tokens,
    channels,
    plan_heads,
    row_bytes,
    codes_bytes,
    top,
    RANGES: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Products of queries, float32 ``(batch, heads, queries, channels)``, with rows ``(batch, own
    heads, tokens, row_bytes)``: scores ``(batch, heads, queries, tokens)``. One of the rows' heads,
    the heads of queries that share it, and some tokens a program; order ``(plan heads, BLOCK)``:
    channel of every place.
    """
    owner = tl.program_id(0)
    window, head = (owner // own_heads).to(tl.int64), owner % own_heads
    plan = tl.where(plan_heads > 1, head, 0)
    place = tl.arange(0, BLOCK)
    inside = place < channels
    own, described = rows + owner.to(tl.int64) * tokens * row_bytes, places + plan * 4 * BLOCK
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    value = values_of_rows(
        own, token, tokens, described, place, inside, row_bytes, codes_bytes, top, RANGES, SIGNED
    )
    shared = heads // own_heads
    line = tl.arange(0, BLOCK_QUERIES)
    asks = line < shared * queries
    row = (window * heads + head * shared + line // queries) * queries + line % queries
    channel = tl.load(order + plan * BLOCK + place, mask=inside, other=0)
    wanted = tl.load(
        query + row[:, None] * channels + channel[None, :],
        mask=asks[:, None] & inside[None, :],
        other=0.0,
    )
    found = tl.dot(wanted, tl.trans(value), input_precision="ieee")
    at = scores + row[:, None] * tokens + token[None, :]
    tl.store(at, found, mask=asks[:, None] & (token < tokens)[None, :])


@triton.jit
def value_sums(
    weights,
    rows,
    order,
    places,
    sums,
    heads,
    own_heads,
    queries,
    tokens,
    channels,
    plan_heads,
    row_bytes,
    codes_bytes,
    top,
    part,
    RANGES: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of rows by weights, float32 ``(batch, heads, queries, tokens)``, over ``part`` tokens a
    program: sums ``(parts, batch, heads, queries, channels)``, which are added up afterwards.
    """
    owner, split = tl.program_id(0), tl.program_id(1)
    window, head = (owner // own_heads).to(tl.int64), owner % own_heads
    plan = tl.where(plan_heads > 1, head, 0)
    place = tl.arange(0, BLOCK)
    inside = place < channels
    own, described = rows + owner.to(tl.int64) * tokens * row_bytes, places + plan * 4 * BLOCK
    shared = heads // own_heads
    line = tl.arange(0, BLOCK_QUERIES)
    asks = line < shared * queries
    row = (window * heads + head * shared + line // queries) * queries + line % queries
    found = tl.zeros((BLOCK_QUERIES, BLOCK), tl.float32)
    last = tl.minimum((split + 1) * part, tokens)
    for start in range(split * part, last, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        value = values_of_rows(
            own,
            token,
            last,
            described,
            place,
            inside,
            row_bytes,
            codes_bytes,
            top,
            RANGES,
            SIGNED,
        )
        weight = tl.load(
            weights + row[:, None] * tokens + token[None, :],
            mask=asks[:, None] & (token < last)[None, :],
            other=0.0,
        )
        found += tl.dot(weight, value, input_precision="ieee")
    channel = tl.load(order + plan * BLOCK + place, mask=inside, other=0)
    whole = tl.num_programs(0) // own_heads * heads * queries
    at = sums + (split.to(tl.int64) * whole + row)[:, None] * channels + channel[None, :]
    tl.store(at, found, mask=asks[:, None] & inside[None, :])
