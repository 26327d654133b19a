"""Spiking self-attention through the model library's attention interface: Q, K, V (and, if asked
for, probabilities) are spikes.

No layer is copied: the library calls :func:`spike_attention` with Q, K and V after rotary
embedding. A :class:`SpikingAttention` that hangs in an attention module as ``spikes`` says how they
are coded; a module without one computes plain attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.models.attention_product import (
    Attention,
    attend_in_blocks,
    fused_attention,
    kept_attention,
    wants_no_weights,
    wants_output_only,
)
from spikellm.models.families import caches_latents, decoder_of
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.nn.hooks import spike_observer
from spikellm.nn.packed_kv import rows_of

IMPLEMENTATION = "spike"
CHILD = "spikes"


class Observation(NamedTuple):
    """One pass through an attention module, as computed: ``(batch, heads, tokens, channels)`` each,
    ``weights`` ``(batch, heads, queries, keys)``
    after the softmax, ``output`` ``(batch, heads, queries, channels)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor
    output: Tensor


Observer = Callable[[nn.Module, Observation], None]
_observer: ContextVar[Observer | None] = ContextVar("spikellm_attention_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """While this holds, every pass through the interface is shown to ``observer``."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor], None]
_watcher: ContextVar[Watcher | None] = ContextVar("spikellm_heads_watcher", default=None)


@contextmanager
def watching_heads(watcher: Watcher) -> Iterator[None]:
    """While this holds, ``watcher`` is shown the attention module and Q, K and V as they were
    multiplied, ``(batch, heads, tokens, channels)``: an observer that takes less time.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def observed() -> bool:
    """Whether somebody wants to see what attention computes, or its spikes."""
    return _observer.get() is not None or spike_observer() is not None


@contextmanager
def uncoded(root: nn.Module) -> Iterator[None]:
    """While this holds, attention within ``root`` codes nothing."""
    spikes = [
        (module, module._modules.pop(CHILD))
        for module in root.modules()
        if CHILD in module._modules
    ]
    try:
        yield
    finally:
        for module, child in spikes:
            module._modules[CHILD] = child


def mark_coded(x: Tensor) -> Tensor:
    """Say of K or V that it comes decoded from a cache: attention does not code it again."""
    x.spikellm_coded = True  # type: ignore[attr-defined]
    return x


def spike_attention(  # noqa: PLR0913  the library's attention interface calls it so
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for the library's interface.

    Grouped-query heads, soft caps and sinks included.

    Returns:
        ``(output, weights)``: ``(batch, queries, heads, channels)`` and ``(batch, heads, queries,
        keys)``, None in the place of weights where nobody wants them
        (:func:`spikellm.models.attention_product.output_only`).

    Raises:
        RequestError: the acausal reference coding of K in generation.
        UnsupportedModelError: the family asks for something that is not implemented here.
    """
    if keywords.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} adds a position bias, which spiking attention does not"
            " implement; leave attention out of the recipe"
        )
    spikes = getattr(module, CHILD, None)
    attend = Attention(spikes, scaling, dropout if module.training else 0.0, softcap, s_aux)
    run = partial(_attended, module, attend, query, key, value, attention_mask)
    if not wants_output_only() or observed():
        return run()
    return kept_attention(module, lambda: run()[0]), None


def _attended(
    module: nn.Module,
    attend: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = query.dtype
    if attend.spikes is not None:
        query, key, value = _coded(module, attend.spikes, query, key, value)
    output, weights = _computed(module, attend, query, key, value, mask)
    if (watcher := _watcher.get()) is not None:
        watcher(module, query, key, value)
    output = output.transpose(1, 2).to(dtype).contiguous()
    return output, None if weights is None else weights.to(dtype)


def _computed(
    module: nn.Module,
    attend: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Output and, if somebody wants them, probabilities of coded Q, K and V."""
    output, unseen = None, _observer.get() is None and wants_no_weights(module)
    if attend.is_plain(key, value):
        output = fused_attention(attend, query, key, value, mask)
    elif unseen and not observed() and wants_output_only() and attend.by_blocks(key, value):
        output = attend_in_blocks(attend, query, key, value, mask)
    if output is not None and unseen:
        return output, None
    whole, weights = attend(query, key, value, mask)
    output = whole if output is None else output  # looking on changes no bit
    if (observer := _observer.get()) is not None:
        observer(module, Observation(query, key, value, weights, output))
    return output, weights


def _coded(
    module: nn.Module, spikes: SpikingAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if spikes.settings.key_axis == "sequence" and query.shape[2] != key.shape[2]:
        raise RequestError(
            "this recipe codes K over the whole sequence, future tokens included, as published"
            " (attention.key_axis: sequence); that is for evaluation only: generate with a recipe"
            " that has key_axis: token"
        )
    query = spikes.turned_query(query)
    if rows_of(key) is not None and rows_of(value) is not None:
        return spikes.code("query", query).float(), key, value
    from_cache = [getattr(t, "spikellm_coded", False) for t in (key, value)]
    if not all(from_cache):
        if any(from_cache) or (
            spikes.caches and not caches_latents(module) and query.shape[2] != key.shape[2]
        ):
            raise UnsupportedModelError(
                f"{type(module).__name__} changes K or V between the cache and attention, so they"
                " would be coded twice; generate with use_cache=False"
            )
        key, value = spikes.code_key_value(key, value)
    return spikes.code("query", query).float(), key.float(), value.float()


@cache
def register() -> None:
    """Make the function known to the model library, with the mask it needs: without it causality
    would silently break.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, spike_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def can_spike(model: Any) -> bool:
    """Whether a model computes attention through the library's interface, and not by itself."""
    return bool(decoder_of(model)._can_set_attn_implementation())


def use_interface(model: Any) -> str:
    """Switch the decoder of a model to :func:`spike_attention`; returns the implementation it had.

    What lies around the decoder, a vision tower say, stays as it is.

    Raises:
        UnsupportedModelError: the family computes attention by itself.
    """
    decoder = decoder_of(model)
    if not can_spike(model):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} computes attention by itself, not through the library's"
            " interface, so it cannot spike; convert the linear layers alone (a recipe without an"
            " attention section)"
        )
    register()
    before = str(decoder.config._attn_implementation)
    decoder.set_attn_implementation(IMPLEMENTATION)
    return before


@torch.no_grad()
def find_attention(model: Any) -> dict[str, HeadShape]:
    """Attention modules by full name, found by running two tokens through a model that uses
    :func:`spike_attention`.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, HeadShape] = {}

    def note(module: nn.Module, seen: Observation) -> None:
        found[names[module]] = HeadShape(
            seen.key.shape[1], seen.key.shape[-1], seen.value.shape[-1]
        )

    with observing(note):
        model(
            torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device),
            use_cache=False,
        )
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} never calls the library's attention interface; convert the"
            " linear layers alone (a recipe without an attention section)"
        )
    return found


def spiking_attentions(model: nn.Module) -> dict[str, SpikingAttention]:
    """Spiking attention of a model, by full name of the module it hangs in."""
    return {
        name.removesuffix(f".{CHILD}"): module
        for name, module in model.named_modules()
        if isinstance(module, SpikingAttention)
    }
