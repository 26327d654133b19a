"""From input samples to channel groups: which channels of a layer are salient, and how many steps
each group gets.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.neurons import make_neuron
from spikellm.nn.layout import make_layout
from spikellm.quantization.ste import WeightCoding
from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.saliency import Evidence, Selection, criteria, salient_count


def salient_channels(
    x: Tensor,
    weight: Tensor,
    settings: ActivationRecipe,
    seed: int,
    name: str,
    gradient: Tensor | None = None,
    count: int | None = None,
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
    return criteria[settings.saliency](
        evidence if count is None else replace(evidence, count=count)
    )


def salient_columns(
    x: Tensor, weight: Tensor, settings: LinearRecipe, seed: int, name: str
) -> Tensor:
    """Steps T of the weights of every column, uint8 ``(in,)``.

    Arguments as for :func:`salient_channels`.
    """
    plain = ActivationRecipe(bits=8)
    evidence = evidence_of(x, weight, plain, settings.weights.salient_rate, seed, f"{name}.weight")
    evidence = replace(evidence, invert=settings.weights.invert)
    salient = criteria[settings.weights.saliency](evidence).salient.to(torch.uint8)
    return 1 + salient * (settings.weights.salient_steps - 1)


def evidence_of(
    x: Tensor,
    weight: Tensor,
    settings: ActivationRecipe,
    rate: float,
    seed: int,
    name: str,
    gradient: Tensor | None = None,
) -> Evidence:
    """What criteria see.

    Arguments as for :func:`salient_channels`, ``rate`` the share of channels to be chosen.
    """
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
    """Of every input channel of a layer, uint8 ``(in,)`` each: its activation group, and the steps
    T of its weights (None: one each).
    """

    channel: Tensor
    column_steps: Tensor | None


def group_of(selection: Selection) -> Tensor:
    """Group of every channel (see ``ActivationRecipe.group_ranges``), uint8 ``(in,)``."""
    return selection.salient.to(torch.uint8) + selection.own_range.to(torch.uint8)


def coding_of(settings: LinearRecipe, groups: Groups) -> WeightCoding:
    """How the weights of a layer are coded, given its groups."""
    layout = make_layout(groups.channel, groups.column_steps, settings)
    tops = [settings.weights.top(steps) for steps in layout.weight_steps]
    return WeightCoding(tops, settings.weights.symmetric, layout.weight_groups, layout.order)
