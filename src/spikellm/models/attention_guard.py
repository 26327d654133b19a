"""What a model with spiking attention is called through: its spikes are computed by the attention
interface alone, and a forward pass under another implementation would skip them, on a cache that
still holds spikes. Wherever such a pass begins, it is refused.

Hooks are functions of this module and no closures, so that models pickle and copy.
"""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.cache_utils import Cache

from spikellm.core.errors import RequestError
from spikellm.models.attention_interface import IMPLEMENTATION, register, spiking_attentions
from spikellm.models.cache import fill_cache, is_filled, spiking_cache
from spikellm.models.families import decoder_of


def guard(model: Any) -> None:
    """Let a model whose attention spikes run as it must: passes that start an empty dynamic cache
    fill it with spiking layers, those under another attention implementation are refused, and so is
    continuous batching.
    """
    decoder_of(model).register_forward_pre_hook(before_decoder, with_kwargs=True)
    for name in spiking_attentions(model):
        model.get_submodule(name).register_forward_pre_hook(before_attention)
    model.init_continuous_batching = refuse_continuous_batching


def before_attention(module: Any, _: tuple[Any, ...]) -> None:
    """Refuse a pass of an attention module that would not spike.

    Raises:
        RequestError: names the implementation found.
    """
    require_interface(module.config, type(module).__name__)


def before_decoder(
    module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a pass through the decoder its spiking cache.

    Raises:
        RequestError: the decoder's attention implementation, whose mask it makes, is another.
        UnsupportedModelError: see :func:`spikellm.models.cache.fill_cache`.
    """
    require_interface(module.config, type(module).__name__)
    cache, wanted = keywords.get("past_key_values"), keywords.get("use_cache")
    if cache is None and (getattr(module.config, "use_cache", False) if wanted is None else wanted):
        return arguments, {**keywords, "past_key_values": spiking_cache(module)}
    if isinstance(cache, Cache) and cache.get_seq_length() == 0 and not is_filled(cache):
        fill_cache(module, cache)
    return arguments, keywords


def require_interface(config: Any, where: str) -> None:
    """Refuse a configuration that names another attention implementation than ours, and make ours
    known to the library where it is not: a model may have been unpickled.

    Raises:
        RequestError: it does.
    """
    register()
    found = config._attn_implementation
    if found != IMPLEMENTATION:
        raise RequestError(
            f"the attention implementation of {where} is {found!r}, under which this model's"
            f" attention would not spike; expected {IMPLEMENTATION!r}: call"
            f" model.set_attn_implementation({IMPLEMENTATION!r})"
        )


def refuse_continuous_batching(*_: Any, **__: Any) -> NoReturn:
    """In the place of a model's ``init_continuous_batching``, which ``generate_batch`` calls."""
    raise RequestError(
        "this model's attention spikes, and continuous batching pages keys and values that are not"
        " spikes; call generate with a left-padded batch and its attention_mask instead"
    )
