"""What kernels of attention need to know of a coder of heads, as one array of 32-bit words.

``native/heads.h`` says the same in C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.native.linear_plan import MODES
from spikellm.quantization.packing import packed_length

_LANES = 16


class HeadCoding(NamedTuple):
    """A coder of heads as kernels see it.

    Tensors are ``(heads, channels)``, of one head where all are alike.

    Attributes:
        mode: how thresholds are found, see :data:`spikellm.kernels.native.linear_plan.MODES`.
        top: largest code of an ordinary channel.
        ranges: how many ranges a token has.
        order: channel at every place of a row, ordinary ones first.
        range_of: range of every channel.
        tops: largest code of every channel.
        fineness: T of every channel over that of ordinary ones.
        ordinary: places of ordinary channels.
        bits: of a stored code, of ordinary and of salient channels.
        row_bytes: bytes of a row.
    """

    mode: str
    top: int
    ranges: int
    order: Tensor
    range_of: Tensor
    tops: Tensor
    fineness: Tensor
    ordinary: int
    bits: tuple[int, int]
    row_bytes: int


def head_coding_fits(coding: HeadCoding) -> bool:
    """Whether kernels can run it: codes are bytes, ranges at most two."""
    return (
        max(coding.bits) <= 8 and coding.top > 0 and coding.ranges <= 2 and coding.order.numel() > 0
    )


def make_head_plan(coding: HeadCoding) -> Tensor:
    """The array, int32."""
    heads, channels = coding.order.shape
    sections: list[int] = []
    places: list[Tensor] = []
    width = 0
    for count, bits in zip((coding.ordinary, channels - coding.ordinary), coding.bits, strict=True):
        held, place = packed_length(count, bits), torch.arange(count)
        shared = 8 // bits if 8 % bits == 0 else 1  # codes in a byte, which stand field by field
        stride = _rounded(held if 8 % bits == 0 else count)
        sections += [count, bits, held, stride, width]
        places.append(width + place % shared * stride + place // shared)
        width += stride * shared
    header = [
        heads,
        channels,
        coding.ranges,
        MODES[coding.mode],
        coding.top,
        coding.row_bytes,
        width,
        *sections,
    ]
    by_place = [
        words.cpu().gather(1, coding.order.cpu()).flatten()
        for words in (coding.range_of, coding.tops, coding.fineness)
    ]
    return torch.cat(
        [
            torch.tensor(header, dtype=torch.int32),
            coding.order.cpu().flatten().int(),
            by_place[0].int(),
            by_place[1].int(),
            by_place[2].float().contiguous().view(torch.int32),
            torch.cat(places).int(),
        ]
    )


def _rounded(count: int) -> int:
    return -(-count // _LANES) * _LANES
