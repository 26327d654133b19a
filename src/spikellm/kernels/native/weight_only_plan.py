"""What the kernels of weights on uncoded inputs need to know of a layer, as one array of integers.

``native/weight_only.h`` says the same in C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.placing import packed_misfit
from spikellm.kernels.spec import LinearSpec

COLUMNS, _LANES, _CODES = 64, 16, 4  # of a block, and of a lane


class PlacedPlan(NamedTuple):
    """The array, and where inputs go.

    Attributes:
        plan: int32.
        order: channel of every place, int64 ``(places,)``; one beyond the last where there is none.
    """

    plan: Tensor
    order: Tensor


def weight_only_misfit(spec: LinearSpec) -> str | None:
    """Why the kernel cannot run a layer whose inputs are not coded; None if it can."""
    if spec.weights != "affine":
        return "inputs are not coded, and weights have no integer form"
    return packed_misfit(spec)


def make_weight_only_plan(spec: LinearSpec) -> PlacedPlan:
    """The plan of a layer that fits."""
    segments: list[int] = []
    place = torch.empty(spec.columns, dtype=torch.int32)
    offset = 0
    for start, stop, _, weight_group in spec.segments:
        first, last = start // COLUMNS, -(-stop // COLUMNS)
        column = torch.arange(start, stop) - first * COLUMNS
        within = column % COLUMNS
        place[start:stop] = (
            offset + column - within + within % _CODES * _LANES + within // _CODES
        ).int()
        segments += [start, stop, weight_group, offset, first, last - first]
        offset += (last - first) * COLUMNS
    header = [
        spec.columns,
        spec.rows,
        spec.weight_bits,
        len(spec.segments),
        (spec.columns * spec.weight_bits + 7) // 8,
        spec.scales,
        offset,
    ]
    source = torch.arange(spec.columns) if spec.order is None else spec.order.cpu()
    words = torch.tensor([*header, *segments], dtype=torch.int32)
    order = torch.full((offset,), spec.columns)
    order[place.long()] = source.long()
    return PlacedPlan(torch.cat([words, source.int(), place]), order)
