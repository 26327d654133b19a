"""Which weights are pruned: exactly as many as are asked for; of equal scores, those that come
first.

The published code of SparseGPT prunes what is at most the (⌊n·s⌋ + 1)-th least score: one too many,
and all that equal it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks of the ``count`` least scores of a tensor, bool of its shape."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    edge = flat.kthvalue(count).values
    marks = flat < edge
    marks[(flat == edge).nonzero().flatten()[: count - int(marks.sum())]] = True
    return marks.view_as(scores)


def counts_by_block(scores: Tensor, count: int, width: int) -> list[int]:
    """How many of the ``count`` least scores lie in every ``width`` columns.

    Args:
        scores: ``(out, in)``, columns in the order of the blocks.
    """
    marks = lowest(scores.T, count).sum(1)
    return [int(part.sum()) for part in marks.split(width)]


def lowest_of_each(scores: Tensor, count: int) -> Tensor:
    """Marks of the ``count`` least scores of each row, bool of the shape of ``scores``."""
    found = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, found, value=True)


def lowest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Marks of the ``n`` least scores of every ``m`` columns of each row, ``(out, in)``.

    A last group of k < m columns has ``⌊n·k/m⌋``.
    """
    parts = scores.split(m, 1)
    return torch.cat([lowest_of_each(part, n * part.shape[1] // m) for part in parts], 1)
