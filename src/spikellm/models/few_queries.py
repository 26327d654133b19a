"""Attention that does not spike, for a few new tokens to a cache: by the native kernel that a
decoder step uses, so that a step and the library's own pass give the same bits. All other passes
are computed as the model computed them before.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.kernels.base import REFERENCE, choice, plain
from spikellm.kernels.native import backend, build, ops
from spikellm.kernels.native.step_plan import torch_lanes
from spikellm.kernels.torch import numbers
from spikellm.models.attention_interface import spike_attention
from spikellm.models.families import decoder_of

BESIDE = {"sdpa": "spike_sdpa", "eager": "spike_eager"}
"""Names of the implementations that leave all but few queries to the one that a model had."""
MOST_QUERIES = 16


def use_few_queries(model: Any) -> None:
    """Let a model whose attention does not spike, and that computes it by the library's interface,
    compute few queries natively.
    """
    decoder = decoder_of(model)
    wanted = BESIDE.get(str(getattr(decoder.config, "_attn_implementation", "")))
    if wanted is None or not decoder._can_set_attn_implementation():
        return
    _register()
    decoder.set_attn_implementation(wanted)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(BESIDE["sdpa"], beside_sdpa)
    AttentionMaskInterface.register(BESIDE["sdpa"], sdpa_mask)
    AttentionInterface.register(BESIDE["eager"], beside_eager)
    AttentionMaskInterface.register(BESIDE["eager"], eager_mask)


def beside_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for the library's interface."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found = few_queries(module, query, key, value, attention_mask, scaling, **keywords)
    if found is not None:
        return found, None
    full: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **keywords
    )
    return full


def beside_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same for a model that computes attention by single operators."""
    found = few_queries(module, query, key, value, attention_mask, scaling, **keywords)
    if found is not None:
        return found, None
    return spike_attention(module, query, key, value, attention_mask, scaling, **keywords)


def few_queries(  # noqa: PLR0913
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    **keywords: Any,
) -> Tensor | None:
    """Output ``(batch, queries, heads, channels)``; None where the kernel does not compute it."""
    queries, tokens = query.shape[2], key.shape[2]
    if not 0 < queries <= min(MOST_QUERIES, tokens - 1) or module.training:
        return None
    if keywords.get("s_aux") is not None or keywords.get("position_bias") is not None:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _fits(query, key, value):
        return None
    seen = None if mask is None else _seen(mask[..., :tokens], len(query))
    if (mask is None and queries > 1) or (mask is not None and seen is None):
        return None
    return _run(query, key, value, seen, scaling, softcap)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        (choice() == REFERENCE or backend.problem() is None)
        and query.dtype in ops.TYPES
        and all(plain(x) and x.is_cpu and x.dtype == query.dtype for x in (query, key, value))
    )


def _seen(mask: Tensor, batch: int) -> Tensor | None:
    """Which keys each query sees, uint8 ``(batch, queries, tokens)``; None where a mask does not
    hide or show alone, or heads differ.
    """
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((seen | hidden).all()):
            return None
    if not bool(seen.any(-1).all()):
        return None
    return seen[:, 0].to(torch.uint8).expand(batch, -1, -1).contiguous()


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    batch, heads, queries, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    if choice() == REFERENCE:
        q, k, v = (x.float() for x in (query, key, value))
        by_torch = numbers.attend(q, k, v, seen, scaling, softcap or 0.0)
        return by_torch.transpose(1, 2).to(query.dtype).contiguous()
    key, value = (_with_whole_rows(x) for x in (key, value))
    x = query.float().contiguous()
    found = x.new_empty(batch, heads, queries, value.shape[-1])
    strides = (*key.stride()[:2], *value.stride()[:2])
    sizes = (ctypes.c_int64 * 14)(
        batch,
        heads,
        key.shape[1],
        queries,
        key.shape[2],
        size,
        value.shape[-1],
        *strides,
        ops.TYPES[key.dtype],
        torch.get_num_threads(),
        torch_lanes(),
    )
    failed = build.load_library().spikellm_attend(
        x.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        ops.pointer(seen),
        found.data_ptr(),
        ctypes.addressof(sizes),
        scaling,
        softcap or 0.0,
    )
    return ops.unless(failed, found).transpose(1, 2).to(query.dtype).contiguous()


def _with_whole_rows(x: Tensor) -> Tensor:
    """``(batch, heads, tokens, channels)`` whose tokens of a head stand one behind the other."""
    stands = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    return x if stands else x.contiguous()
