"""What a conversion needs of memory and disk, estimated before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from spikellm.conversion.block_runner import input_of
from spikellm.core.offload import released_after_forward
from spikellm.models.experts import every_expert_sees_every_token
from spikellm.models.families import weight_and_bias
from spikellm.models.plan import BlockPlan
from spikellm.observers.input_stats import SampledInputs
from spikellm.recipe import LinearRecipe


class Needs(NamedTuple):
    """Estimates, bytes.

    Attributes:
        streams: hidden states of the calibration text, both streams.
        block: the largest block while it is converted: its weights in float32, token samples and
            Hessians of its inputs, working copies of its largest layer.
        journal: converted blocks on disk.
        result: the converted model on disk.
    """

    streams: int
    block: int
    journal: int
    result: int


class Unit(NamedTuple):
    """What is converted at a time: a block or the output projection, and channels of every tensor
    that its observed layers read.
    """

    module: nn.Module
    plan: BlockPlan
    inputs: list[int]


@torch.no_grad()
def find_units(
    model: Any,
    blocks: nn.ModuleList,
    plan: Sequence[BlockPlan],
    head: BlockPlan | None,
    observes: Callable[[LinearRecipe], bool],
) -> list[Unit]:
    """All units of a model.

    Which layers read the same tensor is seen on two tokens, which run as far as blocks bring layers
    of new names.
    """
    layers = [
        {name.removeprefix(own.name): name for name, one in own.linears.items() if observes(one)}
        for own in plan
    ]
    new = [
        index
        for index, own in enumerate(layers)
        if own.keys() - {short for before in layers[:index] for short in before}
    ]
    run = layers[: new[-1] + 1] if new else []
    samples = SampledInputs(
        {name: model.get_submodule(name) for own in run for name in own.values()}, 2, 2
    )
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with samples.hooks(), every_expert_sees_every_token(), released_after_forward(blocks):
        if len(run) < len(blocks):
            input_of(model, blocks[len(run)], tokens)
        else:
            model(tokens, use_cache=False)
    first: dict[str, str] = {}  # of the layers that read the same tensor, by name within the block
    for own in run:
        for short, name in own.items():
            same = samples.readers(name) if samples.get(name) is not None else {name}
            first.setdefault(short, next(other for other, full in own.items() if full in same))
    units = []
    for block, own, settings in zip(blocks, layers, plan, strict=True):
        widths = {
            first[short]: weight_and_bias(model.get_submodule(name))[0].shape[1]
            for short, name in own.items()
        }
        units.append(Unit(block, settings, list(widths.values())))
    if head:
        projection = model.get_submodule(head.name)
        units.append(Unit(projection, head, [weight_and_bias(projection)[0].shape[1]]))
    return units


def estimate(
    model: Any,
    units: Sequence[Unit],
    streams: int,
    sampled: int,
    *,
    hessian: bool,
    sequential: bool = False,
    rotated: bool = False,
    whole: bool = False,
) -> Needs:
    """Needs of a conversion.

    Args:
        units: everything that is converted.
        streams: bytes of the hidden states that are kept at a time.
        sampled: tokens of a sample.
        hessian: whether the pipeline keeps Hessians of all inputs of a block.
        in_turn: whether it keeps second moments of one input at a time.
        rotated: whether weights are rotated, in float64, and compared with what they were, in
            float32; ``whole``: before any block is converted, so that all are in memory.
    """
    largest, coded = 0, 0
    for module, plan, inputs in units:
        weights = [
            (model.get_submodule(name).weight, settings.weights.bits)
            for name, settings in plan.linears.items()
        ]
        numbers = sum(parameter.numel() for parameter in module.parameters())
        samples = 4 * sampled * sum(inputs)
        widest = max(inputs, default=0)
        kept = (
            sum(side * side for side in inputs)
            if hessian
            else 2 * widest * widest
            if sequential
            else 0
        )
        matrices = (
            8 * (kept + 2 * widest * widest) if kept else 0
        )  # sums, a damped copy, its factor
        copies = 6 * 4 * max((weight.numel() for weight, _ in weights), default=0)
        turned = 16 * numbers if rotated else 0
        largest = max(largest, 4 * numbers + samples + max(matrices + copies, turned))
        coded += sum(weight.numel() * bits // 8 for weight, bits in weights)
    rest = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    held = sum(
        parameter.numel() * parameter.element_size()
        for unit in units
        for parameter in unit.module.parameters()
    )
    return Needs(streams, largest + (held if rotated and whole else 0), coded, coded + rest - held)
