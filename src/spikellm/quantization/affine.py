"""Uniform affine codes for weights: ``W ≈ s·(k − z)`` with one scale and zero-point for each row, or for each row and group of columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.quantization.rounding import half_up


class AffineWeights(NamedTuple):
    """Integer codes of a weight matrix.

    Attributes:
        codes: uint8, ``(out, in)``, below ``2**bits``.
        scale: float32, ``(out, groups)``.
        zero: uint8, ``(out, groups)``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def column_groups(columns: int | list[int], group_size: int | None) -> list[tuple[int, int]]:
    """``(start, stop)`` of every group of columns.

    Args:
        columns: how many there are; or a list of ends of sections, across which no group reaches.
        group_size: columns of a group, the last of a section may be shorter; None for one group a section.
    """
    ends = [columns] if isinstance(columns, int) else columns
    groups, start = [], 0
    for end in ends:
        size = group_size or max(end - start, 1)
        groups += [(first, min(first + size, end)) for first in range(start, end, size)]
        start = end
    return groups


def round_to_nearest(weight: Tensor, bits: int, groups: list[tuple[int, int]], *, symmetric: bool = False) -> AffineWeights:
    """Code a weight matrix by the range of each row (and group).

    Args:
        weight: ``(out, in)``, any float dtype, finite.
        bits: 2 to 8.
        groups: columns that share a scale (see :func:`column_groups`).
        symmetric: zero-point in the middle, ``2**(bits-1)``; the lowest code is then left unused.
    """
    weight = weight.float()
    parts = [_one_group(weight[:, start:stop], bits, symmetric) for start, stop in groups]
    return AffineWeights(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def _one_group(weight: Tensor, bits: int, symmetric: bool) -> AffineWeights:
    top = 2**bits - 1
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = torch.maximum(high, -low) / (middle - 1)
        zero = torch.full_like(scale, middle)
    else:
        scale = high / top - low / top
        zero = half_up(-low / scale).nan_to_num(0.0)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    zero = zero.clamp(0, top)
    codes = (half_up(weight / scale) + zero).clamp(1 if symmetric else 0, top)
    return AffineWeights(codes.to(torch.uint8), scale, zero.to(torch.uint8))


def dequantize(weights: AffineWeights, groups: list[tuple[int, int]]) -> Tensor:
    """Values ``s·(k − z)``, float32, ``(out, in)``."""
    codes, scale, zero = weights
    parts = [(codes[:, start:stop].float() - zero[:, g : g + 1].float()) * scale[:, g : g + 1] for g, (start, stop) in enumerate(groups)]
    return torch.cat(parts, dim=1)
