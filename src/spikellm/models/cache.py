"""A key-value cache that holds spikes: every cached token of a head is one row of bytes, packed
codes followed by thresholds and baselines.

The library's own layers keep, crop, reorder and select rows; only what goes in is coded and what
comes out decoded. Each token is coded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from spikellm.core.errors import UnsupportedModelError
from spikellm.models.attention_interface import mark_coded, observed, spiking_attentions
from spikellm.models.families import caches_latents, decoder_of
from spikellm.models.growing_cache import GrowingRows
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.packed_kv import PackedKV
from spikellm.nn.wide_rows import WideRows
from spikellm.quantization.ste import pass_through


class _SpikingRows:
    """Codes before the library's layer stores, decodes after it returns."""

    spikes: SpikingAttention
    channels: tuple[int, int]
    wide: tuple[WideRows, WideRows]  # of keys and values

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.wide = WideRows(), WideRows()

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self.spikes.key_coder(), self.spikes.value_coder()
        self.channels = key_states.shape[-1], value_states.shape[-1]
        key_kernels, value_kernels = key.kernels(key_states), value.kernels(value_states)
        rows = super().update(  # type: ignore[misc]
            key.store(self.spikes.turned_key(key_states), self.wide[0]),
            value.store(value_states, self.wide[1]),
            *arguments,
            **keywords,
        )
        most = min(key_kernels.most_queries, value_kernels.most_queries)
        if key_states.shape[2] < min(rows[0].shape[2], most + 1) and not observed():
            massive = [
                coder.massive_values(own, wide)
                for coder, own, wide in zip((key, value), rows, self.wide, strict=True)
            ]
            return (
                PackedKV(rows[0], key_kernels, self.channels[0], massive[0]).placeholder(),
                PackedKV(rows[1], value_kernels, self.channels[1], massive[1]).placeholder(),
            )
        coded = (
            key.fetch(rows[0], self.channels[0], self.wide[0]),
            value.fetch(rows[1], self.channels[1], self.wide[1]),
        )
        self.spikes.show("key", key, coded[0])
        self.spikes.show("value", value, coded[1])
        decoded = key.decode(coded[0]), value.decode(coded[1])
        return (
            mark_coded(_with_gradient(decoded[0], self.spikes.turned_key, key_states)),
            mark_coded(_with_gradient(decoded[1], Tensor.float, value_states)),
        )


def _with_gradient(cached: Tensor, prepare: Callable[[Tensor], Tensor], new: Tensor) -> Tensor:
    """Decoded tokens, ``(batch, heads, tokens, channels)``; while training, gradients pass straight
    through the codes of the newest ones.
    """
    if not (torch.is_grad_enabled() and new.requires_grad):
        return cached
    old = cached.shape[2] - new.shape[2]
    return torch.cat([cached[:, :, :old], pass_through(prepare(new), cached[:, :, old:])], dim=2)


class SpikingLayer(_SpikingRows, GrowingRows, DynamicLayer):  # type: ignore[misc]
    """Cache of one layer that sees all tokens."""

    def __init__(self, spikes: SpikingAttention) -> None:
        super().__init__()
        self.spikes, self.wide = spikes, (WideRows(), WideRows())


class SpikingSlidingLayer(_SpikingRows, GrowingRows, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Cache of one layer that sees a sliding window."""

    def __init__(self, spikes: SpikingAttention, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.spikes, self.wide = spikes, (WideRows(), WideRows())


def spiking_cache(model: Any) -> Cache:
    """An empty cache of spikes for a model whose attention spikes."""
    cache = DynamicCache(config=decoder_of(model).config)
    fill_cache(model, cache)
    return cache


def fill_cache(model: nn.Module, cache: Cache) -> None:
    """Replace the layers of an empty dynamic cache by spiking ones, where the model's attention
    spikes.

    Raises:
        UnsupportedModelError: a cache of another kind (static, offloaded, quantized).
    """
    for name, attention in spiking_attentions(model).items():
        if not attention.caches or caches_latents(model.get_submodule(name)):
            return
    if type(cache) is not DynamicCache or cache.offloading:
        offloaded = "offloaded " if getattr(cache, "offloading", False) else ""
        raise UnsupportedModelError(
            "keys and values of this model are spikes; found a cache of the kind"
            f" {offloaded}{type(cache).__name__}, expected a DynamicCache without offloading: leave"
            " cache_implementation unset"
        )
    for name, spikes in spiking_attentions(model).items():
        index = int(model.get_submodule(name).layer_idx)  # type: ignore[arg-type]
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = SpikingSlidingLayer(spikes, layer.sliding_window)
        elif type(layer) is DynamicLayer:
            cache.layers[index] = SpikingLayer(spikes)
        else:
            raise UnsupportedModelError(
                f"layer {name} caches in a {type(layer).__name__}, which has no form that holds"
                " spikes; generate with use_cache=False"
            )
    cache.layer_class_to_replicate = None


def is_filled(cache: Cache) -> bool:
    """Whether some layer of a cache holds spikes."""
    return any(isinstance(layer, _SpikingRows) for layer in cache.layers)


def cache_bytes(cache: Cache) -> int:
    """Bytes that the cached keys and values take."""
    tensors = [
        tensor
        for layer in cache.layers
        if layer.is_initialized
        for tensor in (layer.keys, layer.values, *_wide_rows(layer))
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _wide_rows(layer: Any) -> list[Tensor]:
    wide = layer.wide if isinstance(layer, _SpikingRows) else ()
    return [one.rows for one in wide if one.rows is not None]
