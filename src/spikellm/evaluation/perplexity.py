"""Perplexity as the field reports it: the text tokenized once, disjoint windows, the tail dropped,
the mean loss over all targets.

Where the tokenizer puts a BOS token in front of a text by itself, every window starts with one: it
takes the place of one token of text, and is no target. The usual protocol puts it in front of the
whole text, so of the first window alone; ``bos="never"`` does that. Where the tokenizer adds none,
the two are the same.

(The *word* perplexity of evaluation harnesses is another number.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from spikellm.core.errors import NumericalError, RequestError
from spikellm.core.keywords import require_known_keywords
from spikellm.data.tokens import bos_token, read_tokens, require_known
from spikellm.data.windows import disjoint_windows, window_length
from spikellm.models.next_token import summed_loss
from spikellm.models.prepare import evaluating

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Perplexity:
    """Result of one measurement.

    Attributes:
        value: exp of the mean loss, nats a token.
        tokens: targets that the mean is over, ``windows · (seqlen − 1)``.
        windows: disjoint windows used.
        seqlen: tokens of a window, its BOS token included.
        bos: whether every window starts with the BOS token.
    """

    value: float
    tokens: int
    windows: int
    seqlen: int
    bos: bool = False


class PerplexityOptions(TypedDict, total=False):
    """Keywords of :func:`perplexity`, as it describes them."""

    seqlen: int | None
    limit: int | None
    bos: str
    on_batch: Callable[[int, int], None] | None


def perplexity(
    model: Any, tokenizer: Any, source: str, **options: Unpack[PerplexityOptions]
) -> Perplexity:
    """Perplexity of a model on a text.

    Args:
        source: ``wikitext2``, ``c4``, ``ptb``, ``stdlib`` or a path (see
            :mod:`spikellm.data.datasets`).
        seqlen: tokens of a window; min(2048, the model's maximum) by default.
        limit: use the first ``limit`` windows only.
        bos: whether every window starts with the BOS token: ``auto`` (where the tokenizer adds one
            by itself), ``always`` or ``never``.
        on_batch: called with ``(windows done, windows in all)``.

    Raises:
        RequestError: unknown text, a text shorter than one window, a window longer than the model's
            maximum, no BOS token to start windows with.
        NumericalError: the model's loss is not finite.
        TypeError: a keyword that is not known.
    """
    require_known_keywords("perplexity", options, PerplexityOptions.__annotations__)
    bos = options.get("bos", "auto")
    windows = text_windows(
        model,
        tokenizer,
        source,
        seqlen=options.get("seqlen"),
        limit=options.get("limit"),
        bos=bos,
    )
    found = perplexity_of_windows(model, windows, options.get("on_batch"))
    return replace(found, bos=bos_token(tokenizer, bos) is not None)


def text_windows(
    model: Any,
    tokenizer: Any,
    source: str,
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    bos: str = "auto",
) -> Tensor:
    """The windows that :func:`perplexity` measures on, ``(windows, seqlen)``.

    Arguments and errors are the same.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}; expected at least one window")
    length, first = window_length(model.config, seqlen), bos_token(tokenizer, bos)
    tokens = read_tokens(tokenizer, source, "evaluation")
    require_known(tokens, model)
    windows = disjoint_windows(tokens, length, source, first)
    return windows if limit is None else windows[:limit]


@torch.no_grad()
def perplexity_of_windows(
    model: Any, windows: Tensor, on_batch: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Perplexity on given windows, ``(windows, seqlen)``."""
    device = next(model.parameters()).device
    total, done = 0.0, 0
    with evaluating(model):
        for batch in windows.to(device).split(max(1, _BATCH_TOKENS // windows.shape[1])):
            total += summed_loss(model, batch)
            done += batch.shape[0]
            if on_batch:
                on_batch(done, windows.shape[0])
    count, length = windows.shape
    targets = count * (length - 1)
    if not math.isfinite(total):
        raise NumericalError(
            "the model's loss is NaN or infinite on this text; its weights are damaged or its"
            " number type overflows"
        )
    return Perplexity(math.exp(min(total / targets, 700.0)), targets, count, length)
