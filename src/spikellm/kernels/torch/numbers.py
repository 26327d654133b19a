"""Attention of a few queries over keys and values that are numbers, in torch: the same sums in the
same order as the native kernel (``native/numbers.h``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LANES, _TOGETHER = 16, 16


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """Attention, float32 ``(batch, heads, queries, channels)``.

    Args:
        query: ``(batch, heads, queries, channels)``, float32 like the others.
        key, value: ``(batch, key-value heads, tokens, channels)``.
        seen: which keys a query sees, ``(batch, queries, tokens)``; None for all.
        softcap: 0 for none.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    outputs = []
    for index in range(query.shape[2]):
        scores = _in_lanes(query[:, :, index, None] * key) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if seen is not None:
            scores = scores.masked_fill(seen[:, None, index] == 0, -3.4e38)
        weights = torch.softmax(scores, -1)
        outputs.append(_as_tree(weights.unsqueeze(-1) * value))
    return torch.stack(outputs, 2)


def _in_lanes(products: Tensor) -> Tensor:
    """Sums over the last axis, in lanes that are folded in halves."""
    padded = torch.nn.functional.pad(products, (0, -products.shape[-1] % _LANES))
    lanes = _one_by_one(padded.unflatten(-1, (-1, _LANES)), -2)
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.squeeze(-1)


def _as_tree(values: Tensor) -> Tensor:
    """Sums over the tokens of ``(..., tokens, channels)``: some one by one, their sums pairwise."""
    leaves = -(-values.shape[-2] // _TOGETHER)
    whole = 1 << (leaves - 1).bit_length()
    padded = torch.nn.functional.pad(values, (0, 0, 0, whole * _TOGETHER - values.shape[-2]))
    sums = _one_by_one(padded.unflatten(-2, (whole, _TOGETHER)), -2)
    while sums.shape[-2] > 1:
        sums = sums[..., ::2, :] + sums[..., 1::2, :]
    return sums.squeeze(-2)


def _one_by_one(x: Tensor, axis: int) -> Tensor:
    first, *others = x.unbind(axis)
    for other in others:
        first = first + other
    return first
