"""Where the columns of a layer lie for products with packed weight codes.

Packed rows are read as they are, in blocks of 64 bytes. A byte of 2- or 4-bit codes holds several
neighbouring columns: field by field, so inputs are placed in the same way: the first columns of all
bytes of a block, then the second ones. A segment has all blocks that its columns touch; where a
column of another segment stands, its own inputs are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.spec import LinearSpec

BYTES = 64  # of a block of a packed row
_MOST_BITS = 8


def packed_misfit(spec: LinearSpec) -> str | None:
    """Why kernels cannot read a layer's packed weight codes; None if they can."""
    if spec.weight_bits > _MOST_BITS:
        return f"weight codes of {spec.weight_bits} bits do not fit into a byte"
    return "it has no inputs" if spec.columns == 0 else None


class PlacedSegment(NamedTuple):
    """A segment, and where its inputs are placed.

    Attributes:
        start, stop, activation_group, weight_group: see :class:`spikellm.kernels.spec.Segment`.
        offset: its first place.
        first_block, blocks: of packed rows.
    """

    start: int
    stop: int
    activation_group: int
    weight_group: int
    offset: int
    first_block: int
    blocks: int


class Placing(NamedTuple):
    """All segments of a layer.

    Attributes:
        place: of every stored column, int32 ``(in,)``.
        width: places.
        block: columns of a block.
    """

    segments: list[PlacedSegment]
    place: Tensor
    width: int
    block: int


def fields_of(bits: int) -> int:
    """Codes of a byte that are taken apart at once."""
    return 8 // bits if bits in (2, 4) else 1


def place_columns(spec: LinearSpec) -> Placing:
    """Of a layer whose weights have integers."""
    fields = fields_of(spec.weight_bits)
    block, offset = BYTES * fields, 0
    place, segments = torch.empty(spec.columns, dtype=torch.int32), []
    for part in spec.segments:
        first, last = part.start // block, -(-part.stop // block)
        column = torch.arange(part.start, part.stop) - first * block
        within = column % block
        place[part.start : part.stop] = (
            offset + column // block * block + within % fields * BYTES + within // fields
        ).int()
        segments.append(PlacedSegment(*part, offset, first, last - first))
        offset += (last - first) * block
    return Placing(segments, place, offset, block)
