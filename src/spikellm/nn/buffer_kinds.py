"""What the bits of a layer's buffers are for, where stored bits are counted.

A weight format may say it of each of its buffers; else the name does, by the words between its
underscores.
"""

from __future__ import annotations

from typing import Literal

import torch

BufferKind = Literal["codes", "masks", "scales", "indices", "inputs"]
WEIGHT_KINDS: tuple[BufferKind, ...] = ("codes", "masks", "scales", "indices")
"""Kinds of what is stored because of the weights; ``inputs`` is what codes the inputs."""

_MASKS = frozenset({"mask", "masks"})
_SCALES = frozenset({"scale", "scales", "zero", "zeros", "offset", "offsets"})
_CODES = frozenset({"code", "codes", "plane", "planes", "sign", "signs", "spikes"})
_ORDERS = frozenset({"group", "groups", "cluster", "clusters", "order", "permutation"})
_INDICES = _ORDERS | {"steps", "index", "indices", "positions", "columns", "rows"}


def kind_of(name: str, dtype: torch.dtype) -> BufferKind:
    """What a buffer of a weight format is for, by its name: masks; scales, zero-points and offsets;
    codes and planes of bits; indices (steps, groups and order of columns, places). Of other names
    floating point is for scales, integers are codes.
    """
    words = set(name.split("_"))
    if words & _MASKS:
        return "masks"
    if words & _SCALES:
        return "scales"
    if words & _CODES:
        return "codes"
    if dtype.is_floating_point:
        return "scales"
    return "indices" if words & _INDICES else "codes"


def places_columns(name: str, dtype: torch.dtype) -> bool:
    """Whether a buffer that belongs to no format says in which group or order columns are stored,
    without which the weights cannot be read.
    """
    words = set(name.split("_"))
    return not dtype.is_floating_point and "steps" not in words and bool(words & _ORDERS)
