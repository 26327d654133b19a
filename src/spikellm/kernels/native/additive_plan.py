"""Ternary weights in the layout of the additive kernel.

``native/additive.c`` says how it is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OUTPUTS, TRIPLES, _BITS = 64, 6, 5
_COLUMNS = 3 * TRIPLES  # of a word


class TernarySegment(NamedTuple):
    """Stored columns ``start … stop`` that share a scale in each row, and the steps of their
    weights.
    """

    start: int
    stop: int
    weight_group: int
    steps: int


def make_additive_plan(
    weights: Tensor, segments: list[TernarySegment], scales: int, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Plan and words of a layer.

    Args:
        weights: integers ``−T … T``, ``(out, in)``, columns in stored order.
        scales: columns of the tensor of weight scales.
        order: channel of every stored column; None where nothing moved.

    Returns:
        ``(plan, words)``: int32, and int32 ``(blocks of 64 outputs, words, 64)``: 1.78 bits a
        weight and step.
    """
    rows, columns = weights.shape
    blocks = -(-rows // OUTPUTS)
    header, entries, planes, first = [columns, rows, len(segments), scales], [], [], 0
    for segment in segments:
        count = -(-(segment.stop - segment.start) // _COLUMNS)
        entries += [segment.start, segment.stop, segment.weight_group, segment.steps, first, count]
        first += count * segment.steps
        part = weights[:, segment.start : segment.stop]
        for t in range(segment.steps):
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
    source = torch.arange(columns, dtype=torch.int32) if order is None else order.int().cpu()
    plan = torch.cat([torch.tensor([*header, words.shape[1], *entries], dtype=torch.int32), source])
    return plan, words.view(blocks, OUTPUTS, -1).transpose(1, 2).contiguous()
