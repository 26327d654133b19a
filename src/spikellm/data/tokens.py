"""Tokens of texts."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.data.datasets import read_text
from spikellm.data.stdlib import Split

_REMEMBERED = 4

Bos = Literal["auto", "always", "never"]
"""Whether every window starts with the BOS token: always, never (windows are cut from the text as
the tokenizer gives it once), or where the tokenizer puts one in front of a text by itself.
"""

_recent: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Tokens of a whole text, with the tokenizer's own special tokens: int64 ``(tokens,)``."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def bos_token(tokenizer: Any, bos: str) -> int | None:
    """The token that every window is to start with; None where windows start with text.

    Args:
        bos: see :data:`Bos`.

    Raises:
        RequestError: an unknown choice, or ``always`` where the tokenizer has no BOS token.
    """
    require_bos(bos)
    token = getattr(tokenizer, "bos_token_id", None)
    if bos == "always" and token is None:
        raise RequestError(
            "bos is 'always', and the tokenizer has no BOS token to start windows with; leave it at"
            " auto"
        )
    if bos == "never" or token is None or (bos == "auto" and not _adds(tokenizer, token)):
        return None
    return int(token)


def require_bos(bos: str) -> None:
    """Refuse a word that is none of :data:`Bos`.

    Raises:
        RequestError: names those.
    """
    if bos not in get_args(Bos):
        raise RequestError(f"bos is {bos!r}; expected {', '.join(get_args(Bos))}")


def _adds(tokenizer: Any, token: int) -> bool:
    """Whether a tokenizer puts a token in front of every text."""
    encoded: list[int] = tokenizer("a", verbose=False)["input_ids"]
    return encoded[:1] == [token]


def read_tokens(tokenizer: Any, source: str, split: Split) -> Tensor:
    """Tokens of a source, ``(tokens,)``.

    The last few are cached, since comparisons read the same text repeatedly.
    """
    text = read_text(source, split)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenize(tokenizer, text)
    key = (
        hashlib.sha256(text.encode()).hexdigest(),
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
    )
    if key not in _recent:
        _recent[key] = tokenize(tokenizer, text)
    _recent.move_to_end(key)
    while len(_recent) > _REMEMBERED:
        _recent.popitem(last=False)
    return _recent[key]


def known_tokens(model: Any) -> int:
    """How many tokens a model has an embedding for."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])


def require_known(tokens: Tensor, model: Any) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        RequestError: the tokenizer is that of another model.
    """
    known = known_tokens(model)
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= known:
        raise RequestError(
            f"the tokenizer gives token {largest} and the model knows {known}; give the tokenizer"
            " that belongs to the model"
        )
