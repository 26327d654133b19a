"""Ternary weights in the layout of the additive kernel.

``native/additive.c`` says how it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.spec import LinearSpec

OUTPUTS, TRIPLES, _BITS = 64, 6, 5
_COLUMNS = 3 * TRIPLES  # of a word


def make_additive_plan(weights: Tensor, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """Plan and words of some rows of a layer.

    Args:
        weights: integers ``−T … T``, ``(out, in)``, columns in stored order.
        spec: of the whole layer.

    Returns:
        ``(plan, words)``: int32, and int32 ``(blocks of 64 outputs, words, 64)``: 1.78 bits a
        weight and step.
    """
    rows, columns = weights.shape
    blocks = -(-rows // OUTPUTS)
    header: list[int] = [columns, rows, len(spec.segments), spec.scales]
    entries: list[int] = []
    planes: list[Tensor] = []
    first = 0
    for start, stop, _, weight_group in spec.segments:
        count, steps = -(-(stop - start) // _COLUMNS), spec.weight_steps[weight_group]
        entries += [start, stop, weight_group, steps, first, count]
        first += count * steps
        part = weights[:, start:stop]
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
    plan = torch.cat(
        [torch.tensor([*header, words.shape[1], *entries], dtype=torch.int32), order.int()]
    )
    return plan, words.view(blocks, OUTPUTS, -1).transpose(1, 2).contiguous()
