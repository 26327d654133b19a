"""Uniform affine codes for weights: ``W ≈ s·(k − z)`` with one scale and zero-point for each row,
or for each row and group of columns.
"""

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
        group_size: columns of a group, the last of a section may be shorter; None for one group a
            section.
    """
    ends = [columns] if isinstance(columns, int) else columns
    groups, start = [], 0
    for end in ends:
        size = group_size or max(end - start, 1)
        groups += [(first, min(first + size, end)) for first in range(start, end, size)]
        start = end
    return groups


def round_to_nearest(
    weight: Tensor, bits: int, groups: list[tuple[int, int]], *, symmetric: bool = False
) -> AffineWeights:
    """Code a weight matrix by the range of each row (and group).

    Args:
        weight: ``(out, in)``, any float dtype, finite.
        bits: 2 to 8.
        groups: columns that share a scale (see :func:`column_groups`).
        symmetric: see :func:`code_in_range`.
    """
    return code_in_range(
        weight,
        [2**bits - 1] * len(groups),
        groups,
        *weight_range(weight, groups),
        symmetric=symmetric,
    )


def weight_range(weight: Tensor, groups: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each row and group, zero included: float32, ``(out, groups)``
    each.
    """
    parts = [weight[:, start:stop].float() for start, stop in groups]
    return torch.stack([part.amin(1) for part in parts], 1).clamp(max=0), torch.stack(
        [part.amax(1) for part in parts], 1
    ).clamp(min=0)


def code_in_range(
    weight: Tensor,
    tops: list[int],
    groups: list[tuple[int, int]],
    low: Tensor,
    high: Tensor,
    *,
    symmetric: bool = False,
) -> AffineWeights:
    """Code a weight matrix in given ranges; what lies outside is clipped.

    Args:
        tops: largest code of each group, ``2**bits − 1``, or T·L where weights take T steps; at
            most 255.
        low, high: ``(out, groups)``, ``low ≤ 0 ≤ high``.
        symmetric: zero-point in the middle, ``(top + 1) // 2``; for an odd top the lowest code is
            then left unused.
    """
    codes, scale, zero = codes_in_range(weight, tops, groups, low, high, symmetric=symmetric)
    return AffineWeights(codes.to(torch.uint8), scale, zero.to(torch.uint8))


def codes_in_range(
    weight: Tensor,
    tops: list[int],
    groups: list[tuple[int, int]],
    low: Tensor,
    high: Tensor,
    *,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(codes, scale, zero)`` of :func:`code_in_range`, all float32."""
    low, high = low.float(), high.float()
    top = torch.tensor(tops, dtype=torch.float32, device=low.device)
    middle, reach = torch.ceil(top / 2), torch.floor(top / 2)
    scale = torch.maximum(high, -low) / reach if symmetric else high / top - low / top
    zero = middle.expand_as(scale) if symmetric else half_up(-low / scale).nan_to_num(0.0)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    zero = zero.clamp(min=0).minimum(top)
    codes = [
        half_up(weight[:, start:stop].float() / scale[:, g : g + 1])
        .add_(zero[:, g : g + 1])
        .clamp_(tops[g] % 2 if symmetric else 0, tops[g])
        for g, (start, stop) in enumerate(groups)
    ]
    return codes[0] if len(codes) == 1 else torch.cat(codes, dim=1), scale, zero


def dequantize(weights: AffineWeights, groups: list[tuple[int, int]]) -> Tensor:
    """Values ``s·(k − z)``, float32, ``(out, in)``."""
    codes, scale, zero = weights
    parts = [
        (codes[:, start:stop].float() - zero[:, g : g + 1].float()) * scale[:, g : g + 1]
        for g, (start, stop) in enumerate(groups)
    ]
    return torch.cat(parts, dim=1)
