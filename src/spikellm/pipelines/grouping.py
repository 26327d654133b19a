"""From input samples to channel groups: which channels of a layer are salient, and how many steps each group gets."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spikellm.modeling.families import weight_and_bias
from spikellm.modeling.linear import make_layout
from spikellm.neurons import make_neuron
from spikellm.pipelines.base import BlockContext
from spikellm.quantization.straight_through import WeightCoding
from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.saliency import Evidence, Selection, criteria, salient_count


def salient_channels(
    x: Tensor, weight: Tensor, settings: ActivationRecipe, seed: int, name: str, gradient: Tensor | None = None
) -> Selection:
    """The channels that get ``salient_steps``, and those with a range of their own.

    Args:
        x: sampled inputs, float32, ``(tokens, in)``.
        weight: ``(out, in)``.
        settings: how the inputs are coded.
        seed, name: decide the draw of random controls.
        gradient: see :class:`spikellm.saliency.Evidence`.
    """
    evidence = Evidence(
        x=x,
        weight=weight.detach().float().to(x.device),
        neuron=make_neuron(settings.neuron, settings.bits),
        steps=settings.steps,
        salient_steps=settings.salient_steps,
        count=salient_count(settings.salient_rate, x.shape[1]),
        split=settings.thresholds == "split",
        symmetric=settings.symmetric,
        invert=settings.invert,
        generator=torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**63),
        gradient=gradient,
    )
    return criteria[settings.saliency](evidence)


def group_of(selection: Selection) -> Tensor:
    """Group of every channel (see ``ActivationRecipe.group_ranges``), uint8 ``(in,)``."""
    return selection.salient.to(torch.uint8) + selection.own_range.to(torch.uint8)


def choose_groups(context: BlockContext, evidence: Callable[[str], tuple[Tensor, Tensor]]) -> Iterator[tuple[list[str], Tensor]]:
    """Channel groups of all layers of a block.

    Layers that read the same tensor with the same settings are fed by one population of neurons, so its salient channels are chosen once for
    all of them, by what they cost together; with ``salient_for: layer`` each layer chooses for itself, as published.

    Args:
        evidence: ``evidence(name)`` gives the sampled inputs ``(tokens, in)`` of a layer and its weight ``(out, in)``.

    Yields:
        ``(names, group)``: layers that share a choice, and the group of every channel, uint8 ``(in,)``.
    """
    pending = list(context.layers)
    while pending:
        first = pending[0]
        activations = context.settings[first].activations
        shared = activations.spiking and activations.salient_for == "input"
        names = context.readers(first) if shared else [first]
        pending = [name for name in pending if name not in names]
        if activations.salient_rate > 0:
            x, weight = evidence(first)
            weights = [weight, *(evidence(name)[1] for name in names[1:])]
            group = group_of(salient_channels(x, torch.cat(weights), activations, context.recipe.seed, first))
        else:
            weight, _ = weight_and_bias(context.layers[first])
            group = torch.zeros(weight.shape[1], dtype=torch.uint8, device=weight.device)
        yield names, group


def coding_of(settings: LinearRecipe, channel_group: Tensor) -> WeightCoding:
    """How the weights of a layer are coded, given the group of every input channel."""
    layout = make_layout(channel_group, torch.tensor(settings.activations.group_steps), settings)
    return WeightCoding(settings.weights.bits, settings.weights.symmetric, layout.weight_groups, layout.order)
