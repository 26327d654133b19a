"""Codes of a table of rows, such as those of a vocabulary: symmetric, in the range of each row and
group of columns that loses least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.quantization.affine import AffineWeights, code_in_range, dequantize, weight_range

_SHARES = tuple(share / 64 for share in range(64, 47, -1))
"""Parts of a row's range that are tried, the whole of it first, until no row gains."""


def code_table(table: Tensor, bits: int, groups: list[tuple[int, int]]) -> AffineWeights:
    """Codes of a table, ``(rows, columns)`` of any float type, finite; of a long one, a few
    thousand rows at a time take little memory, and have the same codes.

    Of each row and group that share of its range is taken whose squared error is least; of equal
    ones the largest.

    Args:
        bits: 2 to 8.
        groups: columns that share a scale.
    """
    rows = table.float()
    low, high = weight_range(rows, groups)
    reach, tops = torch.maximum(high, -low), [2**bits - 1] * len(groups)
    codes, scale, zero = code_in_range(rows, tops, groups, -reach, reach, symmetric=True)
    least = _errors(rows, AffineWeights(codes, scale, zero), groups)
    for share in _SHARES[1:]:
        own = reach * share
        trial = code_in_range(rows, tops, groups, -own, own, symmetric=True)
        errors = _errors(rows, trial, groups)
        better = errors < least
        if not bool(better.any()):
            break
        least = torch.where(better, errors, least)
        scale = torch.where(better, trial.scale, scale)
        for group, (start, stop) in enumerate(groups):
            chosen = better[:, group : group + 1]
            own_codes = trial.codes[:, start:stop]
            codes[:, start:stop] = torch.where(chosen, own_codes, codes[:, start:stop])
    return AffineWeights(codes, scale, zero)


def _errors(rows: Tensor, coded: AffineWeights, groups: list[tuple[int, int]]) -> Tensor:
    """Squared error of each row and group, ``(rows, groups)``."""
    lost = dequantize(coded, groups).sub_(rows).square_()
    return torch.stack([lost[:, start:stop].sum(1) for start, stop in groups], 1)
