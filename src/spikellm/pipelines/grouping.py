"""From input samples to channel groups: which channels of a layer are salient, and how many steps each group gets."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from spikellm.modeling.linear import SpikingLinear
from spikellm.recipe import LinearRecipe
from spikellm.saliency import Evidence, best_cut, choose, criteria, ranking, salient_count


def salient_channels(x: Tensor, weight: Tensor, settings: LinearRecipe, seed: int, name: str) -> Tensor:
    """Mask of the channels that get ``salient_steps``.

    Args:
        x: sampled inputs, float32, ``(tokens, in)``.
        weight: ``(out, in)``.
        settings: recipe of the layer.
        seed, name: decide the draw of random controls.

    Returns:
        bool, ``(in,)``.
    """
    activations = settings.activations
    evidence = Evidence(
        x=x,
        weight=weight.detach().float().to(x.device),
        neuron=_neuron(settings),
        steps=activations.steps,
        salient_steps=activations.salient_steps,
        count=salient_count(activations.salient_rate, x.shape[1]),
        thresholds=activations.thresholds,
        generator=torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**63),
    )
    scores = criteria[activations.saliency](evidence)
    count = best_cut(evidence, ranking(scores, invert=activations.invert)) if activations.search_cut else evidence.count
    return choose(scores, count, invert=activations.invert)


def assign_groups(layer: SpikingLinear, salient: Tensor | None) -> None:
    """Write channel groups and their steps into a layer: group 0 ordinary, group 1 salient."""
    activations = layer.settings.activations
    if salient is None:
        layer.set_groups(torch.zeros_like(layer.channel_group), [activations.steps] * activations.groups)
    else:
        layer.set_groups(salient.to(torch.uint8), [activations.steps, activations.salient_steps])


def _neuron(settings: LinearRecipe):  # type: ignore[no-untyped-def]
    from spikellm.neurons import make_neuron

    return make_neuron(settings.activations.neuron, settings.activations.bits)
