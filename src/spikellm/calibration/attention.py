"""Which channels of K and V are salient: what is sampled of attention, and how groups are chosen from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spikellm.calibration.activations import TokenSample
from spikellm.modeling.attention import Observation, observing
from spikellm.modeling.attention_spikes import HeadShape, SpikingAttention
from spikellm.pipelines.grouping import group_of, salient_channels
from spikellm.recipe import ActivationRecipe, AttentionRecipe

ATTENTION_TOKENS = 2048  # tokens from which channels of K and V are ranked
_PARTS = ("query", "key", "value", "value_gradient")


class AttentionSample:
    """Token samples of Q, K, V and of ``PᵀPV`` of attention modules, heads side by side: ``(tokens, heads·channels)``."""

    def __init__(self, modules: dict[str, nn.Module], seen: int, wanted: int, before: int = 0) -> None:
        self._names = {module: name for name, module in modules.items()}
        self._samples = {name: {part: TokenSample(seen, wanted, before) for part in _PARTS} for name in modules}

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return {part: sample.tokens() for part, sample in self._samples[name].items()}

    def put_together(self) -> None:
        """Take over what other ranks saw."""
        for parts in self._samples.values():
            for sample in parts.values():
                sample.put_together()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this holds, every pass through the modules is sampled."""

        def observe(module: nn.Module, seen: Observation) -> None:
            if module not in self._names:
                return
            groups = seen.query.shape[1] // seen.key.shape[1]
            gradient = seen.weights.float().transpose(2, 3) @ seen.output.float()  # PᵀPV of every query head
            gradient = gradient.unflatten(1, (-1, groups)).sum(2)
            for part, x in zip(_PARTS, (seen.query, seen.key, seen.value, gradient), strict=True):
                self._samples[self._names[module]][part].update(x.transpose(1, 2).flatten(2))

        with observing(observe):
            yield


def fit_attention(
    name: str, shape: HeadShape, settings: AttentionRecipe, sample: dict[str, Tensor] | None, seed: int, device: torch.device
) -> SpikingAttention:
    """Spiking attention with its salient channels chosen, head by head.

    First order, as published (SpikeLLM §3.3): K by ``K ∘ (QᵀQ K)``, with Q of all query heads that share the key head; V by ``V ∘ (PᵀP V)``. Criteria that weigh errors take
    Q as the weight of K, and 1 for every channel of V.

    Args:
        sample: from :class:`AttentionSample`; needed where K or V have salient channels.
    """
    spikes = SpikingAttention(shape, settings, device)
    if sample is None:
        return spikes
    queries = sample["query"].unflatten(1, (-1, shape.key_channels))
    per_head = queries.shape[1] // shape.heads
    keys, values, gradients = (sample[part].unflatten(1, (shape.heads, -1)) for part in ("key", "value", "value_gradient"))
    if settings.center:
        spikes.key_mean.copy_(keys.mean(0))
        keys = keys - spikes.key_mean
    queries, keys = spikes.turned(queries), spikes.turned(keys)
    key_groups, value_groups = [], []
    for head in range(shape.heads):
        query = queries[:, head * per_head : (head + 1) * per_head].flatten(0, 1)
        key_groups.append(_group(keys[:, head], query, None, settings.key, seed, f"{name}.key.{head}"))
        ones = torch.eye(shape.value_channels, device=values.device)
        value_groups.append(_group(values[:, head], ones, gradients[:, head], settings.value, seed, f"{name}.value.{head}"))
    spikes.set_groups(torch.stack(key_groups), torch.stack(value_groups))
    return spikes


def _group(x: Tensor, weight: Tensor, gradient: Tensor | None, settings: ActivationRecipe, seed: int, name: str) -> Tensor:
    if settings.salient_rate == 0:
        return torch.zeros(x.shape[1], dtype=torch.uint8, device=x.device)
    return group_of(salient_channels(x, weight, settings, seed, name, gradient))
