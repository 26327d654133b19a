"""Spiking attention with its salient channels chosen."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from spikellm.algorithms import InputCoding
from spikellm.conversion.context import ConversionContext
from spikellm.models.attention_interface import CHILD
from spikellm.models.plan import BlockPlan
from spikellm.models.swap import replace_module
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.channels import Sample, group_of, salient_channels
from spikellm.observers.attention_stats import AttentionSample
from spikellm.observers.head_moments import HeadMoments
from spikellm.quantization.balance import balanced_map
from spikellm.quantization.massive_tokens import find_massive, range_width
from spikellm.recipe import ActivationRecipe, AttentionRecipe


def ranked_attentions(context: ConversionContext, plan: BlockPlan) -> dict[str, nn.Module]:
    """Attention modules of a block of which something is to be sampled, by full name."""
    return {
        name: context.model.get_submodule(name)
        for name, (_, settings) in plan.attentions.items()
        if needs_tokens(settings) or settings.center or settings.balance
    }


def needs_tokens(settings: AttentionRecipe) -> bool:
    """Whether channels of K or V, or massive tokens, are told from a sample of tokens."""
    parts = (settings.key, settings.value)
    return any(part.salient_rate > 0 or part.token_steps > 0 for part in parts)


def fit_attentions(
    context: ConversionContext, plan: BlockPlan, samples: AttentionSample
) -> dict[str, nn.Module]:
    """Spiking attention for every attention module of a block, by full name; from here on the block
    codes Q, K and V.

    Args:
        samples: of those that :func:`ranked_attentions` names.
    """
    found: dict[str, nn.Module] = {}
    seed, device = context.recipe.seed, context.options.device
    for name, (shape, settings) in plan.attentions.items():
        child = f"{name}.{CHILD}"
        found[child] = spikes = SpikingAttention(shape, settings, device)
        if name in samples.moments:
            set_center_and_map(spikes, samples.moments[name])
        if (sample := samples.get(name)) is not None:
            choose_channels(name, spikes, sample, seed, context.allocated.salient)
        for part in settings.priced_parts:
            coding = context.allocated.coding.get(part_name(name, part), InputCoding())
            spikes.set_price(part, coding.price)
        replace_module(context.model, child, found[child])
    return found


def set_center_and_map(spikes: SpikingAttention, moments: HeadMoments) -> None:
    """Set what K is centered by and the map of pairs of its channels, where the recipe says so."""
    center = moments.center() if spikes.settings.center else None
    if center is not None:
        spikes.key_mean.copy_(center)
    if spikes.settings.balance:
        of_key, of_query = (_pairs(found) for found in (moments.spread(center), moments.asking()))
        spikes.key_map.copy_(balanced_map(of_key, of_query))
    spikes.forget()


def _pairs(moments: Tensor) -> Tensor:
    """``(heads, channels, channels)`` → ``(heads, channels / 2, 2, 2)``: of channels i and
    i + half, without the last of an odd number, which rotary embedding mixes in most families.
    """
    even = moments.shape[1] // 2 * 2
    # (heads, 2, half, 2, half)
    halves = moments[:, :even, :even].unflatten(2, (2, -1)).unflatten(1, (2, -1))
    found: Tensor = halves.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)
    return found


def choose_channels(
    name: str,
    spikes: SpikingAttention,
    sample: dict[str, Tensor],
    seed: int,
    counts: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Choose the salient channels of every head, and tell its massive tokens.

    First order, as published (SpikeLLM §3.3): K by ``K ∘ (QᵀQ K)``, with Q of all query heads that
    share the key head; V by ``V ∘ (PᵀP V)``. Criteria that weigh errors take Q as the weight of K,
    and 1 for every channel of V.

    Args:
        sample: from :class:`AttentionSample`.
        counts: how many channels of a head are salient, by :func:`part_name`, where that is not
            what the settings' rate says.
    """
    shape, settings = spikes.shape, spikes.settings
    for part in ("key", "value"):
        _tell_massive(spikes, part, sample)
    queries = sample["query"].unflatten(1, (-1, shape.key_channels))
    per_head = queries.shape[1] // shape.heads
    keys, values, gradients = (
        sample[part].unflatten(1, (shape.heads, -1)) for part in ("key", "value", "value_gradient")
    )
    queries, keys = (
        turn(x.transpose(0, 1)).transpose(0, 1)
        for turn, x in ((spikes.turned_query, queries), (spikes.turned_key, keys))
    )
    key_groups, value_groups = [], []
    for head in range(shape.heads):
        query = queries[:, head * per_head : (head + 1) * per_head].flatten(0, 1)
        key_groups.append(
            _group(
                Sample(keys[:, head], query),
                settings.key,
                seed,
                f"{name}.key.{head}",
                counts.get(part_name(name, "key")),
            )
        )
        ones = torch.eye(shape.value_channels, device=values.device)
        value_groups.append(
            _group(
                Sample(values[:, head], ones, gradients[:, head]),
                settings.value,
                seed,
                f"{name}.value.{head}",
                counts.get(part_name(name, "value")),
            )
        )
    spikes.set_groups(torch.stack(key_groups), torch.stack(value_groups))


def _tell_massive(spikes: SpikingAttention, part: str, sample: dict[str, Tensor]) -> None:
    """Set the threshold of every head of K or V beyond which a token is massive."""
    settings: ActivationRecipe = getattr(spikes.settings, part)
    if not settings.token_steps:
        return
    x = sample[f"{part}_as_it_came"].unflatten(1, (spikes.shape.heads, -1)).transpose(0, 1)
    widths = range_width(spikes.turned_key(x) if part == "key" else x).squeeze(-1)
    for head, own in enumerate(widths):
        found = find_massive(own, settings.token_steps, settings.token_factor, settings.token_rate)
        if found is not None:
            spikes.get_buffer(f"{part}_threshold")[head] = found.beyond


def part_name(attention: str, part: str) -> str:
    """Under which name K or V of an attention module is told how many channels are salient."""
    return f"{attention}.{part}"


def _group(
    sample: Sample, settings: ActivationRecipe, seed: int, name: str, count: int | None
) -> Tensor:
    if settings.salient_rate == 0 or count == 0:
        return torch.zeros(sample.x.shape[1], dtype=torch.uint8, device=sample.x.device)
    return group_of(salient_channels(sample, settings, seed, name, count))
