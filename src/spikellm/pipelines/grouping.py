"""From input samples to channel groups: which channels of a layer are salient, and how many steps each group gets."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from spikellm.modeling.linear import SpikingLinear
from spikellm.neurons import make_neuron
from spikellm.recipe import ActivationRecipe
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


def assign_groups(layer: SpikingLinear, selection: Selection | None) -> None:
    """Write the group of every channel into a layer (see ``ActivationRecipe.group_ranges``)."""
    layer.set_groups(torch.zeros_like(layer.channel_group) if selection is None else group_of(selection))
