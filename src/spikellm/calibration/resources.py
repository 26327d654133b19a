"""What a conversion needs of memory and disk, estimated before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from spikellm.calibration.plan import BlockPlan


class Needs(NamedTuple):
    """Estimates, bytes.

    Attributes:
        streams: hidden states of the calibration text, both streams.
        block: the largest block while it is converted: its weights in float32, Hessians, working copies of its largest layer.
        journal: converted blocks on disk.
        result: the converted model on disk.
    """

    streams: int
    block: int
    journal: int
    result: int


def estimate(
    model: Any, blocks: nn.ModuleList, plan: Sequence[BlockPlan], tokens: int, width: int, element: int, *, hessian: bool
) -> Needs:
    """Needs of a conversion.

    Args:
        tokens: of the calibration text; ``width`` and ``element``: channels of a hidden state, bytes of each.
        hessian: whether the pipeline keeps Hessians.
    """
    largest, journal = 0, 0
    for block, own in zip(blocks, plan, strict=True):
        weights = [(model.get_submodule(name).weight, settings.weights.bits) for name, settings in own.linears.items()]
        whole = sum(parameter.numel() for parameter in block.parameters())
        matrices = (
            sum(8 * side * side for side in {max(weight.shape) for weight, _ in weights}) * 3 if hessian else 0
        )  # sum, damped copy, its factor
        largest = max(largest, 4 * whole + matrices + 6 * 4 * max((weight.numel() for weight, _ in weights), default=0))
        journal += sum(weight.numel() * bits // 8 for weight, bits in weights)
    rest = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    held = sum(parameter.numel() * parameter.element_size() for block in blocks for parameter in block.parameters())
    return Needs(2 * tokens * width * element, largest, journal, journal + rest - held)
