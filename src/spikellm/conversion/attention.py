"""Spiking attention with its salient channels chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spikellm.conversion.context import ConversionContext
from spikellm.models.attention_interface import CHILD
from spikellm.models.plan import BlockPlan
from spikellm.models.swap import replace_module
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.nn.channels import Sample, group_of, salient_channels
from spikellm.quantization.massive_tokens import find_massive, range_width
from spikellm.recipe import ActivationRecipe, AttentionRecipe


def ranked_attentions(context: ConversionContext, plan: BlockPlan) -> dict[str, nn.Module]:
    """Attention modules of a block of which something is to be sampled, by full name."""
    return {
        name: context.model.get_submodule(name)
        for name, (_, settings) in plan.attentions.items()
        if settings.key.salient_rate + settings.value.salient_rate > 0
        or settings.key.token_steps + settings.value.token_steps > 0
        or settings.center
    }


def fit_attentions(
    context: ConversionContext, plan: BlockPlan, samples: Mapping[str, dict[str, Tensor]]
) -> dict[str, nn.Module]:
    """Spiking attention for every attention module of a block, by full name; from here on the block
    codes Q, K and V.

    Args:
        samples: from :class:`spikellm.observers.attention_stats.AttentionSample`, of those that
            :func:`ranked_attentions` names.
    """
    found: dict[str, nn.Module] = {}
    seed, device = context.recipe.seed, context.options.device
    for name, (shape, settings) in plan.attentions.items():
        child = f"{name}.{CHILD}"
        found[child] = fit_attention(name, shape, settings, samples.get(name), seed, device)
        replace_module(context.model, child, found[child])
    return found


def fit_attention(
    name: str,
    shape: HeadShape,
    settings: AttentionRecipe,
    sample: dict[str, Tensor] | None,
    seed: int,
    device: torch.device,
) -> SpikingAttention:
    """Spiking attention with its salient channels chosen, head by head.

    First order, as published (SpikeLLM §3.3): K by ``K ∘ (QᵀQ K)``, with Q of all query heads that
    share the key head; V by ``V ∘ (PᵀP V)``. Criteria that weigh errors take Q as the weight of K,
    and 1 for every channel of V.

    Args:
        sample: from :class:`AttentionSample`; needed where K or V have salient channels.
    """
    spikes = SpikingAttention(shape, settings, device)
    if sample is None:
        return spikes
    queries = sample["query"].unflatten(1, (-1, shape.key_channels))
    per_head = queries.shape[1] // shape.heads
    keys, values, gradients = (
        sample[part].unflatten(1, (shape.heads, -1)) for part in ("key", "value", "value_gradient")
    )
    if settings.center:
        spikes.key_mean.copy_(keys.mean(0))
        keys = keys - spikes.key_mean
    for part in ("key", "value"):
        _tell_massive(spikes, part, sample)
    queries, keys = spikes.turned(queries), spikes.turned(keys)
    key_groups, value_groups = [], []
    for head in range(shape.heads):
        query = queries[:, head * per_head : (head + 1) * per_head].flatten(0, 1)
        key_groups.append(
            _group(keys[:, head], query, None, settings.key, seed, f"{name}.key.{head}")
        )
        ones = torch.eye(shape.value_channels, device=values.device)
        value_groups.append(
            _group(
                values[:, head],
                ones,
                gradients[:, head],
                settings.value,
                seed,
                f"{name}.value.{head}",
            )
        )
    spikes.set_groups(torch.stack(key_groups), torch.stack(value_groups))
    return spikes


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


def _group(
    x: Tensor,
    weight: Tensor,
    gradient: Tensor | None,
    settings: ActivationRecipe,
    seed: int,
    name: str,
) -> Tensor:
    if settings.salient_rate == 0:
        return torch.zeros(x.shape[1], dtype=torch.uint8, device=x.device)
    return group_of(salient_channels(Sample(x, weight, gradient), settings, seed, name))
