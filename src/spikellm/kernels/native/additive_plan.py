"""Ternary weights, and sums of planes of them, in the layout of the additive kernel.

``native/additive.c`` says how it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikellm.kernels.spec import LinearSpec, Segment

OUTPUTS, TRIPLES, _BITS = 64, 6, 5
_COLUMNS = 3 * TRIPLES  # of a word


def make_additive_plan(weights: Sequence[Tensor], spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """Plan and words of some rows of a layer; every plane with scales of its own has segments of
    its own.

    Args:
        weights: integers ``−T … T``, ``(out, in)``, columns in stored order, of each plane.
        spec: of the whole layer.

    Returns:
        ``(plan, words)``: int32, and int32 ``(blocks of 64 outputs, words, 64)``: 1.78 bits a
        weight and step.
    """
    rows, columns = weights[0].shape
    blocks = -(-rows // OUTPUTS)
    entries: list[int] = []
    planes: list[Tensor] = []
    first = 0
    segments = [(s, plane) for s in spec.segments for plane in range(_planes_of(spec, s))]
    for (start, stop, _, weight_group), plane in segments:
        count = -(-(stop - start) // _COLUMNS)
        steps = 1 if spec.planes else spec.weight_steps[weight_group]
        entries += [start, stop, weight_group * spec.most_planes + plane, steps, first, count]
        first += count * steps
        part = weights[plane][:, start:stop]
        for t in range(steps):
            digits = (part > t).to(torch.int32) - (-part > t).to(torch.int32) + 1
            digits = torch.nn.functional.pad(
                digits, (0, count * _COLUMNS - part.shape[1], 0, blocks * OUTPUTS - rows), value=1
            )
            triples = digits.view(-1, count, TRIPLES, 3) @ torch.tensor(
                [1, 3, 9], dtype=torch.int32
            )
            shifts = torch.arange(TRIPLES, dtype=torch.int32) * _BITS
            planes.append((triples << shifts).sum(-1, dtype=torch.int32))
    words = torch.cat(planes, 1) if planes else torch.zeros(blocks * OUTPUTS, 0, dtype=torch.int32)
    order = torch.arange(columns) if spec.order is None else spec.order.cpu()
    header = [columns, rows, len(segments), spec.scales]
    plan = torch.cat(
        [torch.tensor([*header, words.shape[1], *entries], dtype=torch.int32), order.int()]
    )
    return plan, words.view(blocks, OUTPUTS, -1).transpose(1, 2).contiguous()


def _planes_of(spec: LinearSpec, segment: Segment) -> int:
    return spec.planes[segment.weight_group] if spec.planes else 1
