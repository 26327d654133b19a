"""What attention computes of coded Q, K and V: all at once, or some queries at a time where nobody
wants to see its probabilities. Scores then stay in the processor's cache, and keys that lie in the
future of all these queries are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.nn.attention import SpikingAttention
from spikellm.nn.packed_kv import rows_of

_SCORES = 1 << 18  # that are computed at a time
_QUERIES = 256  # a block of fewer is no faster, and some processors sum it in another order

_output_only: ContextVar[bool] = ContextVar("spikellm_attention_output_only", default=False)

Keeper = Callable[[nn.Module, Callable[[], Tensor]], Tensor]
"""``keeper(module, run)`` gives the output of an attention module: what ``run`` gives, or what it
gave before.
"""
_keeper: ContextVar[Keeper | None] = ContextVar("spikellm_attention_keeper", default=None)


@contextmanager
def keeping_attention(keeper: Keeper) -> Iterator[None]:
    """While this holds, ``keeper`` is asked for the outputs of attention, where nobody wants more
    (:func:`output_only`).
    """
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)


def kept_attention(module: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """The output of an attention module, by :func:`keeping_attention` if that holds."""
    keeper = _keeper.get()
    return run() if keeper is None else keeper(module, run)


@contextmanager
def output_only() -> Iterator[None]:
    """While this holds, attention need not give its probabilities."""
    token = _output_only.set(True)
    try:
        yield
    finally:
        _output_only.reset(token)


def wants_no_weights(module: nn.Module) -> bool:
    """Whether nobody would see probabilities of an attention module: :func:`output_only` holds, or
    the library collects none, and no hook of anybody else's is shown what the module gives.
    """
    if _output_only.get():
        return True
    if torch.compiler.is_compiling() or _collects_attentions():
        return False
    return all(map(_is_librarys, module._forward_hooks.values()))


def _collects_attentions() -> bool:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # no public name tells; without it probabilities are always computed
        return True
    return "attentions" in (_active_collector.get() or ())


def _is_librarys(hook: object) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def wants_output_only() -> bool:
    """Whether :func:`output_only` holds, and no gradient is asked for."""
    return _output_only.get() and not torch.is_grad_enabled()


class Attention(NamedTuple):
    """Attention of one module, arguments as the library's interface has them.

    Attributes:
        spikes: how probabilities are coded, and K was centered; None of plain attention.
        dropout: 0 unless the module is being trained.
    """

    spikes: SpikingAttention | None
    scaling: float | None
    dropout: float
    softcap: float | None
    s_aux: Tensor | None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output and probabilities, ``(batch, heads, queries, channels)`` and ``(batch, heads,
        queries, keys)``.
        """
        spikes, s_aux = self.spikes, self.s_aux
        scores = _key_scores(query, key)
        if spikes is not None and (self.softcap is not None or s_aux is not None):
            scores = scores + spikes.center_scores(query)  # a softmax alone would not see them
        scores = scores * (query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + mask[..., : key.shape[-2]]
        if s_aux is not None:
            scores = torch.cat(
                [
                    scores,
                    s_aux.to(scores.dtype)
                    .reshape(1, -1, 1, 1)
                    .expand(scores.shape[0], -1, scores.shape[2], 1),
                ],
                dim=-1,
            )
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        if s_aux is not None:
            weights = weights[..., :-1]
        if spikes is not None:
            weights = spikes.code("probabilities", weights)
        weights = nn.functional.dropout(weights, p=self.dropout, training=self.dropout > 0)
        return _value_sums(weights, value), weights

    def is_plain(self, key: Tensor, value: Tensor) -> bool:
        """Whether :func:`fused_attention` may stand for it: nothing is done to probabilities."""
        spikes = self.spikes
        coded = spikes is not None and spikes.settings.probabilities.spiking
        return not coded and self.by_blocks(key, value)

    def by_blocks(self, key: Tensor, value: Tensor) -> bool:
        """Whether heads and queries can be computed one by one."""
        plain = self.softcap is None and self.s_aux is None and self.dropout == 0
        return plain and rows_of(key) is None and rows_of(value) is None


def fused_attention(
    attend: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """The output of ``attend``, ``(batch, heads, queries, channels)``, up to the order of sums, by
    torch's own function: no probabilities are kept, not for gradients either.

    Arguments as for :func:`attend_in_blocks`.
    """
    return nn.functional.scaled_dot_product_attention(
        query,
        _repeated(key, query.shape[1]),
        _repeated(value, query.shape[1]),
        attn_mask=None if mask is None else mask[..., : key.shape[-2]].to(query.dtype),
        scale=attend.scaling,
    )


def attend_in_blocks(
    attend: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """The output of ``attend``, ``(batch, heads, queries, channels)``, up to the order of sums.

    Args:
        attend: see :meth:`Attention.by_blocks`.
        query, key, value: ``(batch, heads, tokens, channels)``; heads of K and V may be fewer.
        mask: added to scores, ``(batch or 1, heads or 1, queries, keys or more)``.
    """
    batch, heads, queries, _ = query.shape
    own, keys = key.shape[1], key.shape[2]
    sharing = heads // own
    rows = max(_QUERIES, _SCORES // max(1, sharing * keys))
    output = value.new_empty(batch, heads, queries, value.shape[-1])
    for first in range(0, queries, rows):
        now = slice(first, min(first + rows, queries))
        part = None if mask is None else mask[:, :, now, :keys]
        seen = keys if part is None else _seen(part)
        for window in range(batch):
            for head in range(own):
                its = slice(head * sharing, (head + 1) * sharing)
                output[window, its, now] = attend(
                    query[window : window + 1, its, now],
                    key[window : window + 1, head : head + 1, :seen],
                    value[window : window + 1, head : head + 1, :seen],
                    None if part is None else _part(part, window, its)[..., :seen],
                )[0]
    return output


def _part(mask: Tensor, window: int, heads: slice) -> Tensor:
    """A mask of one window and some heads."""
    mask = mask[window : window + 1] if len(mask) > 1 else mask
    return mask[:, heads] if mask.shape[1] > 1 else mask


def _seen(mask: Tensor) -> int:
    """How many of the first keys hold all that any of these queries sees; all keys where a query
    sees none, since it then weighs all alike.
    """
    visible = mask > torch.finfo(mask.dtype).min / 2
    if not bool(visible.any(-1).all()):
        return mask.shape[-1]
    return int(visible.flatten(0, -2).any(0).nonzero()[-1]) + 1


def _key_scores(query: Tensor, key: Tensor) -> Tensor:
    if (rows := rows_of(key)) is not None:
        return rows.scores(query)
    return query @ _repeated(key, query.shape[1]).to(query.dtype).transpose(2, 3)


def _value_sums(weights: Tensor, value: Tensor) -> Tensor:
    if (rows := rows_of(value)) is not None:
        return rows.sums(weights)
    return weights.to(value.dtype) @ _repeated(value, weights.shape[1])


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values for every head that shares them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
