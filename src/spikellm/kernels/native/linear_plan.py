"""What a native kernel needs to know of a layer, as one array of integers.

``native/plan.h`` says the same in C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BYTES = 64  # of a block of a packed row
MODES = {"asymmetric": 0, "symmetric": 1, "signed": 2}


class Part(NamedTuple):
    """Stored columns ``start … stop`` with one activation group and one weight group."""

    start: int
    stop: int
    activation_group: int
    weight_group: int


class Shape(NamedTuple):
    """A spiking layer as kernels see it.

    Attributes:
        columns, rows: inputs and outputs.
        bits: of a weight code.
        mode: how thresholds are found, see :data:`MODES`.
        tops: largest code of each activation group.
        bounds: stored columns of each activation group, ``(start, stop)``.
        ranges: stored columns of each range, ``(start, stop)``; ``range_of`` that of each group.
        parts: segments in order.
        scales: columns of the tensor of weight scales.
        order: channel of every stored column; None where nothing moved.
    """

    columns: int
    rows: int
    bits: int
    mode: str
    tops: list[int]
    bounds: list[tuple[int, int]]
    ranges: list[tuple[int, int]]
    range_of: list[int]
    parts: list[Part]
    scales: int
    order: Tensor | None


def fits(shape: Shape) -> bool:
    """Whether kernels can run the layer: spike counts are bytes, and sums stay within 32 bits."""
    largest = max(shape.tops, default=0) * (2 if shape.mode == "signed" else 1)
    return (
        0 < largest <= 255
        and shape.bits <= 8
        and shape.columns > 0
        and largest * 2**shape.bits * shape.columns < 2**31
    )


def block_columns(bits: int) -> int:
    """Columns of a block."""
    return _BYTES * 8 // bits if bits in (2, 4) else _BYTES


def make_plan(shape: Shape) -> Tensor:
    """The array, int32."""
    block = block_columns(shape.bits)
    fields = 8 // shape.bits if shape.bits in (2, 4) else 1
    segments: list[int] = []
    place = torch.empty(shape.columns, dtype=torch.int32)
    offset = 0
    for part in shape.parts:
        first, last = part.start // block, -(-part.stop // block)
        column = torch.arange(part.start, part.stop) - first * block
        within = column % block
        place[part.start : part.stop] = (
            offset + column // block * block + within % fields * _BYTES + within // fields
        ).int()
        segments += [*part, offset, first, last - first]
        offset += (last - first) * block
    row_bytes = (shape.columns * shape.bits + 7) // 8
    groups = [
        word
        for top, (start, stop), span in zip(shape.tops, shape.bounds, shape.range_of, strict=True)
        for word in (start, stop, top, span)
    ]
    header = [
        shape.columns,
        shape.rows,
        shape.bits,
        MODES[shape.mode],
        len(shape.tops),
        len(shape.ranges),
        len(shape.parts),
        offset,
        row_bytes,
        shape.scales,
        block,
    ]
    source = (
        torch.arange(shape.columns, dtype=torch.int32) if shape.order is None else shape.order.int()
    )
    words = torch.tensor(
        [*header, *groups, *(word for span in shape.ranges for word in span), *segments],
        dtype=torch.int32,
    )
    return torch.cat([words, source.cpu(), place])
