"""From input samples to channel groups: which channels of a layer are salient, and how many steps each group gets."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from spikellm.modeling.linear import SpikingLinear
from spikellm.neurons import make_neuron
from spikellm.recipe import LinearRecipe
from spikellm.saliency import Evidence, Selection, criteria, salient_count


def salient_channels(x: Tensor, weight: Tensor, settings: LinearRecipe, seed: int, name: str) -> Selection:
    """The channels that get ``salient_steps``, and those with a range of their own.

    Args:
        x: sampled inputs, float32, ``(tokens, in)``.
        weight: ``(out, in)``.
        settings: recipe of the layer.
        seed, name: decide the draw of random controls.
    """
    activations = settings.activations
    evidence = Evidence(
        x=x,
        weight=weight.detach().float().to(x.device),
        neuron=make_neuron(activations.neuron, activations.bits),
        steps=activations.steps,
        salient_steps=activations.salient_steps,
        count=salient_count(activations.salient_rate, x.shape[1]),
        split=activations.thresholds == "split",
        symmetric=activations.symmetric,
        invert=activations.invert,
        generator=torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**63),
    )
    return criteria[activations.saliency](evidence)


def assign_groups(layer: SpikingLinear, selection: Selection | None) -> None:
    """Write the group of every channel into a layer (see ``ActivationRecipe.group_ranges``)."""
    group = torch.zeros_like(layer.channel_group)
    if selection is not None:
        group += selection.salient.to(torch.uint8) + selection.own_range.to(torch.uint8)
    layer.set_groups(group)
