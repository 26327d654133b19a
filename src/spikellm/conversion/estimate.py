"""What a conversion needs of memory and disk, estimated before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.compensation import KEPT
from spikellm.conversion.block_runner import batch_windows, input_of
from spikellm.conversion.plan import ConversionPlan
from spikellm.core.offload import released_after_forward
from spikellm.models.experts import every_expert_sees_every_token
from spikellm.models.families import has_tied_head, weight_and_bias
from spikellm.models.next_token import LOGIT_BYTES
from spikellm.models.plan import BlockPlan
from spikellm.observers.input_stats import SampledInputs, stride_of
from spikellm.observers.token_weights import SamplePlan
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
    that its sampled layers read.
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
    needs_inputs: Callable[[LinearRecipe], bool],
) -> list[Unit]:
    """All units of a model.

    Which layers read the same tensor is seen on two tokens, which run as far as blocks bring layers
    of new names.
    """
    layers = [
        {
            name.removeprefix(own.name): name
            for name, one in own.linears.items()
            if needs_inputs(one)
        }
        for own in plan
    ]
    new = [
        index
        for index, own in enumerate(layers)
        if own.keys() - {short for before in layers[:index] for short in before}
    ]
    run = layers[: new[-1] + 1] if new else []
    samples = SampledInputs(
        {name: model.get_submodule(name) for own in run for name in own.values()},
        SamplePlan(2, 2),
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
            same = samples.shared_input_layers(name) if samples.get(name) is not None else {name}
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


def estimate(plan: ConversionPlan) -> Needs:
    """Needs of a conversion."""
    model = plan.model
    units = find_units(
        model, plan.blocks.modules, plan.plan, plan.head, plan.algorithm.needs_inputs
    )
    largest = max(_unit_bytes(plan, unit) for unit in units)
    coded = sum(
        weight.numel() * bits // 8 for unit in units for weight, bits in _weights(model, unit.plan)
    )
    rest = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    held = sum(
        parameter.numel() * parameter.element_size()
        for unit in units
        for parameter in unit.module.parameters()
    )
    if plan.transforms.active and plan.surveyed:  # all blocks are prepared before one is converted
        largest += held
    if plan.surveyed:
        largest = max(largest, held * plan.transforms.active + _backward_bytes(plan, units))
    if plan.transforms.unties_embeddings:  # rotated, both stay in memory
        table = model.get_input_embeddings().weight
        largest += table.numel() * table.element_size() * 2
        rest += table.numel() * table.element_size() * has_tied_head(model)
    return Needs(
        _stream_bytes(plan),
        largest + _forward_bytes(plan, units[: len(plan.plan)]),
        coded,
        coded + rest - held,
    )


def _forward_bytes(plan: ConversionPlan, units: Sequence[Unit]) -> int:
    """Of one pass through a block: scores and probabilities of attention, and what its widest layer
    reads and gives.
    """
    windows, length = _batch(plan)
    return windows * (_scores(plan, length) + 4 * 4 * length * max(map(_widest, units)))


def _backward_bytes(plan: ConversionPlan, units: Sequence[Unit]) -> int:
    """Of a backward pass through the whole model on one window: what every layer reads and gives,
    and the probabilities, are kept until then.
    """
    length, size = plan.windows.shape[1], plan.model.dtype.itemsize
    kept = sum(
        2 * size * length * sum(sum(weight.shape) for weight, _ in _weights(plan.model, unit.plan))
        + _scores(plan, length) // 3
        for unit in units
    )
    return int(kept) + LOGIT_BYTES


def _batch(plan: ConversionPlan) -> tuple[int, int]:
    """Windows that are run at a time, and tokens of one."""
    length = plan.windows.shape[1]
    return min(batch_windows(length), len(plan.windows)), length


def _scores(plan: ConversionPlan, length: int) -> int:
    """Of the scores of one window and what is made of them, where attention is computed by ours."""
    heads = getattr(plan.model.config.get_text_config(), "num_attention_heads", 1)
    return 24 * int(heads) * length * length if plan.recipe.attention.spiking else 0


def _widest(unit: Unit) -> int:
    return max(
        (max(weight.shape) for weight in unit.module.parameters() if weight.dim() > 1), default=0
    )


def _stream_bytes(plan: ConversionPlan) -> int:
    """Of the hidden states that are kept at a time; those of the output projection take the place
    of all others.
    """
    channels = plan.model.get_input_embeddings().weight.shape[1]
    state = channels * torch.empty(0, dtype=plan.model.dtype).element_size()
    streams = 3 if plan.algorithm.needs_fp_input(plan.recipe) else 2
    tokens = max(streams * plan.shard.windows.numel(), plan.shard.whole if plan.head else 0)
    return int(tokens * state)


def _unit_bytes(plan: ConversionPlan, unit: Unit) -> int:
    """Of one unit while it is converted."""
    whole = plan.shard.whole
    sampled = -(-whole // stride_of(whole, plan.recipe.calibration.saliency_tokens))
    numbers = sum(parameter.numel() for parameter in unit.module.parameters())
    samples = 4 * sampled * sum(unit.inputs)
    weights = [weight.numel() for weight, _ in _weights(plan.model, unit.plan)]
    fitting = _moment_bytes(plan, unit) + _kept_bytes(plan, unit)
    fitting += 6 * 4 * max(weights, default=0)
    fitting = max(fitting, plan.algorithm.learning_bytes(plan.recipe) * sum(weights))
    # transforms work in float64, and compare with what was in float32
    transforming = 16 * numbers if plan.transforms.active else 0
    return 4 * numbers + samples + max(fitting, transforming)


def _moment_bytes(plan: ConversionPlan, unit: Unit) -> int:
    """Of second moments: sums for all inputs or one at a time, a damped copy and its factor."""
    widest = max(unit.inputs, default=0)
    kept = 0
    if plan.algorithm.needs_hessian(plan.recipe):
        kept = sum(side * side for side in unit.inputs)
    elif plan.algorithm.needs_fp_input(plan.recipe):
        kept = 2 * widest * widest
    return 8 * (kept + 2 * widest * widest) if kept else 0


def _kept_bytes(plan: ConversionPlan, unit: Unit) -> int:
    """Of what layers read and give, kept while they are fitted one after the other."""
    if not plan.algorithm.needs_fp_input(plan.recipe):
        return 0
    channels = sum(unit.inputs) + sum(len(one) for one, _ in _weights(plan.model, unit.plan))
    return int(min(KEPT, plan.shard.windows.numel() * channels * plan.model.dtype.itemsize))


def _weights(model: Any, plan: BlockPlan) -> list[tuple[Tensor, int]]:
    """Weight and bits of every layer of a unit."""
    return [
        (model.get_submodule(name).weight, settings.weights.bits)
        for name, settings in plan.linears.items()
    ]
