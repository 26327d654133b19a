"""What a native kernel needs to know of a layer, as one array of integers.

``native/plan.h`` says the same in C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikellm.kernels.native.price_plan import bits_of, own_coding, price_words
from spikellm.kernels.placing import packed_misfit, place_columns
from spikellm.kernels.spec import LinearSpec

MODES = {"asymmetric": 0, "symmetric": 1, "signed": 2}


def misfit(spec: LinearSpec) -> str | None:
    """Why the integer kernel cannot run a layer; None if it can.

    Spike counts are bytes, and sums stay within 32 bits.
    """
    largest = max([*spec.tops, spec.massive_top], default=0) * (
        2 if spec.thresholds == "signed" else 1
    )
    steps = [spec.most_steps(group) for group in range(len(spec.steps))]
    if spec.massive is not None:
        steps += spec.steps
    if spec.neuron is not None and (reason := own_coding(spec.neuron, steps)):
        return reason
    if not spec.has_integers:
        return "its weights have no integer form"
    if not 0 < largest <= 255:
        return f"spike counts up to {largest} do not fit into a byte"
    if reason := packed_misfit(spec):
        return reason
    if largest * 2**spec.weight_bits * spec.columns >= 2**31:
        return f"sums over {spec.columns} columns may exceed 32 bits"
    return None


def make_plan(spec: LinearSpec) -> Tensor:
    """The array, int32, of a layer that fits."""
    bits, spans = spec.weight_bits, list(dict.fromkeys(spec.ranges))
    placed = place_columns(spec)
    constants = spec.fixed or [(0.0, 0.0)] * len(spec.tops)
    groups = [
        word
        for group, (top, (start, stop), span, (theta, z)) in enumerate(
            zip(spec.tops, spec.bounds, spec.ranges, constants, strict=True)
        )
        for word in (
            *(start, stop, top, spans.index(span)),
            *(bits_of(spec.share(group)), bits_of(theta), int(z)),
        )
    ]
    most = max(map(spec.most_steps, range(len(spec.steps))))
    price = price_words(spec.neuron, most, max([*spec.tops, spec.massive_top]))
    header = [
        spec.columns,
        spec.rows,
        bits,
        MODES[spec.thresholds or "asymmetric"],
        len(spec.tops),
        len(spans),
        len(spec.segments),
        placed.width,
        (spec.columns * bits + 7) // 8,
        spec.scales,
        placed.block,
        int(spec.threshold_source == "mean"),
        int(spec.neuron is not None and spec.neuron.stops_gradients),
        spec.massive_top,
        int(bool(spec.fixed)),
        bits_of(spec.massive.beyond if spec.massive is not None else math.inf),
        *price.header,
    ]
    source = (
        torch.arange(spec.columns, dtype=torch.int32) if spec.order is None else spec.order.int()
    )
    words = torch.tensor(
        [*header, *groups, *(word for part in (*spans, *placed.segments) for word in part)],
        dtype=torch.int32,
    )
    return torch.cat([words, source.cpu(), placed.place, price.table])
