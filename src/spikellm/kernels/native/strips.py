"""Matrix products of many tokens with rows that are decoded once, some at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NUMBERS = 1 << 20  # decoded at a time


def multiply_strips(
    inputs: Tensor,
    y: Tensor,
    decode: Callable[[int, Tensor], object],
    end: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """Write outputs into ``y``, and give it back.

    Args:
        inputs: float32, ``(tokens, places)``.
        y: ``(tokens, out)``.
        decode: writes rows from the first given on into float32 ``(rows, places)``.
        end: makes outputs of sums, ``(tokens, rows)``, of these rows.
    """
    rows, places = y.shape[1], inputs.shape[1]
    step = max(1, _NUMBERS // max(1, places))
    decoded = inputs.new_empty(min(step, rows), places)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        own = decoded[: part.stop - first]
        decode(first, own)
        with torch.autocast("cpu", enabled=False):
            sums = inputs @ own.T
        y[:, part] = end(sums, part)
    return y
