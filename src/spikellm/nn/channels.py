"""From input samples to channel groups: which channels of a layer are salient, and how many steps
each group gets.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.nn.clusters import clusters_of, with_steps
from spikellm.nn.layout import make_layout
from spikellm.quantization.massive_tokens import MassiveTokens
from spikellm.quantization.ste import WeightCoding
from spikellm.quantization.thresholds import FULL_RANGE, Threshold
from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.saliency import Evidence, Selection, criteria, salient_count


class Sample(NamedTuple):
    """What was observed of a layer, from which its channels are chosen.

    Attributes:
        x: sampled inputs, float32, ``(tokens, in)``.
        weight: ``(out, in)``.
        gradient: see :class:`spikellm.saliency.Evidence`.
    """

    x: Tensor
    weight: Tensor
    gradient: Tensor | None = None


def salient_channels(
    sample: Sample, settings: ActivationRecipe, seed: int, name: str, count: int | None = None
) -> Selection:
    """The channels that get ``salient_steps``, and those with a range of their own.

    Args:
        settings: how the inputs are coded.
        seed, name: decide the draw of random controls.
        count: how many; by default as many as the settings' rate says.
    """
    evidence = evidence_of(sample, settings, settings.salient_rate, seed, name)
    if count is not None:
        evidence = replace(evidence, count=count)
    return criteria[settings.saliency](evidence)


def salient_columns(sample: Sample, settings: LinearRecipe, seed: int, name: str) -> Tensor:
    """Steps T of the weights of every column, uint8 ``(in,)``.

    Arguments as for :func:`salient_channels`.
    """
    weights, plain = settings.weights, ActivationRecipe(bits=8)
    evidence = evidence_of(sample, plain, weights.salient_rate, seed, f"{name}.weight")
    evidence = replace(evidence, invert=weights.invert)
    salient = criteria[weights.saliency](evidence).salient.to(torch.uint8)
    return 1 + salient * (weights.salient_steps - 1)


def evidence_of(
    sample: Sample, settings: ActivationRecipe, rate: float, seed: int, name: str
) -> Evidence:
    """What a criterion is given; ``rate`` is the share of channels that it chooses.

    Other arguments as for :func:`salient_channels`.
    """
    x, weight, gradient = sample
    return Evidence(
        x=x,
        weight=weight.detach().float().to(x.device),
        neuron=settings.make_neuron(),
        steps=settings.steps,
        salient_steps=settings.salient_steps,
        count=salient_count(rate, x.shape[1]),
        split=settings.thresholds == "split",
        symmetric=settings.symmetric,
        invert=settings.invert,
        generator=torch.Generator().manual_seed(seed_of(name, seed)),
        gradient=gradient,
        share=settings.coded_share,
        source=settings.threshold_from,
    )


def seed_of(name: str, seed: int) -> int:
    """Seed of the random draws for one layer."""
    return (seed + zlib.crc32(name.encode())) % 2**63


class Groups(NamedTuple):
    """Groups of a layer's input channels.

    Attributes:
        channel: activation group of every channel, uint8 ``(in,)``.
        column_steps: steps T of the weights of every column, uint8 ``(in,)``; None for one each.
        range_share: see :func:`spikellm.quantization.thresholds.coded_range`.
        massive: tokens that take more steps.
        price: of a spike, see :mod:`spikellm.neurons.price`.
        fixed: θ and z of every activation group, float32 ``(groups,)``, where they are constants.
    """

    channel: Tensor
    column_steps: Tensor | None
    range_share: int = FULL_RANGE
    massive: MassiveTokens | None = None
    price: float = 0.0
    fixed: Threshold | None = None


def grouped(
    sample: Sample, settings: ActivationRecipe, seed: int, name: str, count: int | None = None
) -> Tensor:
    """Group of every channel (see ``ActivationRecipe.group_ranges``), uint8 ``(in,)``: clusters,
    and salient channels.

    Arguments as for :func:`salient_channels`.
    """
    if settings.clusters > 1:
        cluster = clusters_of(sample.x, settings.clusters, seed_of(f"{name}.clusters", seed))
        if settings.salient_rate == 0:
            return cluster
        most = salient_count(settings.salient_rate, len(cluster))
        return with_steps(settings, cluster, sample.x, sample.weight, most)
    if settings.salient_rate == 0 or count == 0:
        return torch.zeros(sample.x.shape[1], dtype=torch.uint8, device=sample.x.device)
    return group_of(salient_channels(sample, settings, seed, name, count))


def group_of(selection: Selection) -> Tensor:
    """Group of every channel (see ``ActivationRecipe.group_ranges``), uint8 ``(in,)``."""
    return selection.salient.to(torch.uint8) + selection.own_range.to(torch.uint8)


def coding_of(settings: LinearRecipe, groups: Groups) -> WeightCoding:
    """How the weights of a layer are coded, given its groups."""
    layout = make_layout(groups.channel, groups.column_steps, settings)
    tops = [settings.weights.top(steps) for steps in layout.weight_steps]
    return WeightCoding(tops, settings.weights.symmetric, layout.weight_groups, layout.order)
