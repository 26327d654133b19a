"""From input samples to channel groups: which channels of a layer are salient, and how many steps each group gets."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.modeling.families import weight_and_bias
from spikellm.modeling.layout import make_layout
from spikellm.neurons import make_neuron
from spikellm.pipelines.base import BlockContext
from spikellm.quantization.straight_through import WeightCoding
from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.saliency import Evidence, Selection, criteria, salient_count


def salient_channels(
    x: Tensor, weight: Tensor, settings: ActivationRecipe, seed: int, name: str, gradient: Tensor | None = None, count: int | None = None
) -> Selection:
    """The channels that get ``salient_steps``, and those with a range of their own.

    Args:
        x: sampled inputs, float32, ``(tokens, in)``.
        weight: ``(out, in)``.
        settings: how the inputs are coded.
        seed, name: decide the draw of random controls.
        gradient: see :class:`spikellm.saliency.Evidence`.
        count: how many; by default what the settings' rate stands for.
    """
    evidence = evidence_of(x, weight, settings, settings.salient_rate, seed, name, gradient)
    return criteria[settings.saliency](evidence if count is None else replace(evidence, count=count))


def salient_columns(x: Tensor, weight: Tensor, settings: LinearRecipe, seed: int, name: str) -> Tensor:
    """Steps T of the weights of every column, uint8 ``(in,)``; arguments as for :func:`salient_channels`."""
    plain = ActivationRecipe(bits=8)
    evidence = evidence_of(x, weight, plain, settings.weights.salient_rate, seed, f"{name}.weight")
    evidence = replace(evidence, invert=settings.weights.invert)
    salient = criteria[settings.weights.saliency](evidence).salient.to(torch.uint8)
    return 1 + salient * (settings.weights.salient_steps - 1)


def evidence_of(
    x: Tensor, weight: Tensor, settings: ActivationRecipe, rate: float, seed: int, name: str, gradient: Tensor | None = None
) -> Evidence:
    """What criteria see; arguments as for :func:`salient_channels`, ``rate`` the share of channels to be chosen."""
    return Evidence(
        x=x,
        weight=weight.detach().float().to(x.device),
        neuron=make_neuron(settings.neuron, settings.bits),
        steps=settings.steps,
        salient_steps=settings.salient_steps,
        count=salient_count(rate, x.shape[1]),
        split=settings.thresholds == "split",
        symmetric=settings.symmetric,
        invert=settings.invert,
        generator=torch.Generator().manual_seed(seed_of(name, seed)),
        gradient=gradient,
    )


def seed_of(name: str, seed: int) -> int:
    """The seed of what is drawn for one layer."""
    return (seed + zlib.crc32(name.encode())) % 2**63


class Groups(NamedTuple):
    """Of every input channel of a layer, uint8 ``(in,)`` each: its activation group, and the steps T of its weights (None: one each)."""

    channel: Tensor
    column_steps: Tensor | None


def group_of(selection: Selection) -> Tensor:
    """Group of every channel (see ``ActivationRecipe.group_ranges``), uint8 ``(in,)``."""
    return selection.salient.to(torch.uint8) + selection.own_range.to(torch.uint8)


def choose_groups(context: BlockContext, evidence: Callable[[str], tuple[Tensor, Tensor]]) -> Iterator[tuple[list[str], dict[str, Groups]]]:
    """Channel groups of all layers of a block.

    Layers that read the same tensor with the same settings are fed by one population of neurons, so its salient channels are chosen once for
    all of them, by what they cost together; with ``salient_for: layer`` each layer chooses for itself, as published. Columns whose weights take
    several steps are each layer's own.

    Args:
        evidence: ``evidence(name)`` gives the sampled inputs ``(tokens, in)`` of a layer and its weight ``(out, in)``.

    Yields:
        ``(names, groups)``: layers that share their channel groups, and the groups of each.
    """
    pending = list(context.layers)
    while pending:
        first = pending[0]
        activations = context.settings[first].activations
        shared = not activations.spiking or activations.salient_for == "input"
        names = context.readers(first) if shared else [first]
        pending = [name for name in pending if name not in names]
        if activations.salient_rate > 0 and context.salient.get(first) != 0:
            weights = torch.cat([evidence(name)[1] for name in names])
            group = group_of(
                salient_channels(evidence(first)[0], weights, activations, context.recipe.seed, first, count=context.salient.get(first))
            )
        else:
            weight, _ = weight_and_bias(context.layers[first])
            group = torch.zeros(weight.shape[1], dtype=torch.uint8, device=weight.device)
        yield names, {name: Groups(group, _column_steps(name, context, evidence)) for name in names}


def _column_steps(name: str, context: BlockContext, evidence: Callable[[str], tuple[Tensor, Tensor]]) -> Tensor | None:
    settings = context.settings[name]
    return salient_columns(*evidence(name), settings, context.recipe.seed, name) if settings.weights.salient_rate > 0 else None


def coding_of(settings: LinearRecipe, groups: Groups) -> WeightCoding:
    """How the weights of a layer are coded, given its groups."""
    layout = make_layout(groups.channel, groups.column_steps, settings)
    tops = [settings.weights.top(steps) for steps in layout.weight_steps]
    return WeightCoding(tops, settings.weights.symmetric, layout.weight_groups, layout.order)
