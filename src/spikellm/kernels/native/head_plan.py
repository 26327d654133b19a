"""What kernels of attention need to know of a coder of heads, as one array of 32-bit words.

``native/heads.h`` says the same in C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.native.linear_plan import MODES
from spikellm.kernels.native.price_plan import bits_of, own_coding, price_words
from spikellm.kernels.spec import HeadSpec
from spikellm.neurons.base import keeps
from spikellm.quantization.packing import packed_length

_LANES = 16


def head_misfit(spec: HeadSpec) -> str | None:
    """Why kernels cannot run a coder of heads; None if they can.

    Codes are bytes, ranges at most two, and run over the channels of one token.
    """
    if reason := own_coding(spec.neuron, spec.channel_steps.unique().tolist()):
        return reason
    if not keeps(spec.neuron, "top"):
        return "its neuron has other codes than T·L"
    if spec.axis != "token":
        return "ranges run over the sequence"
    if not spec.uniform:
        return "heads differ in how many channels are salient"
    if max(spec.bits) > 8:
        return f"codes of {max(spec.bits)} bits do not fit into a byte"
    if spec.top == 0 or spec.ranges > 2 or spec.order.numel() == 0:
        return "it has no codes, more than two ranges, or no channels"
    return None


def make_head_plan(spec: HeadSpec) -> Tensor:
    """The array, int32, of a coder that fits."""
    heads, channels = spec.order.shape
    tops, fineness = spec.channel_steps * spec.neuron.levels, spec.channel_steps / spec.steps
    sections: list[int] = []
    places: list[Tensor] = []
    width = 0
    for count, bits in zip((spec.ordinary, channels - spec.ordinary), spec.bits, strict=True):
        held, place = packed_length(count, bits), torch.arange(count)
        shared = 8 // bits if 8 % bits == 0 else 1  # codes in a byte, which stand field by field
        stride = _rounded(held if 8 % bits == 0 else count)
        sections += [count, bits, held, stride, width]
        places.append(width + place % shared * stride + place // shared)
        width += stride * shared
    price = price_words(spec.neuron, int(spec.channel_steps.max()), int(tops.max()))
    header = [
        heads,
        channels,
        spec.ranges,
        MODES[spec.thresholds],
        spec.top,
        spec.row_bytes(channels),
        width,
        int(spec.threshold_source == "mean"),
        bits_of(spec.share),
        *sections,
        *price.header,
    ]
    by_place = [
        words.cpu().gather(1, spec.order.cpu()).flatten()
        for words in (spec.range_of, tops, fineness)
    ]
    return torch.cat(
        [
            torch.tensor(header, dtype=torch.int32),
            spec.order.cpu().flatten().int(),
            by_place[0].int(),
            by_place[1].int(),
            by_place[2].float().contiguous().view(torch.int32),
            torch.cat(places).int(),
            price.table,
        ]
    )


def _rounded(count: int) -> int:
    return -(-count // _LANES) * _LANES
