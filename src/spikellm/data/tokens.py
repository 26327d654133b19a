"""Tokens of texts."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.data.datasets import read_text
from spikellm.data.stdlib import Split

_REMEMBERED = 4


_recent: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Tokens of a whole text, with the tokenizer's own special tokens: int64 ``(tokens,)``."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


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


def require_known(tokens: Tensor, model: Any) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        RequestError: the tokenizer is that of another model.
    """
    known = int(model.get_input_embeddings().weight.shape[0])
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= known:
        raise RequestError(
            f"the tokenizer gives token {largest} and the model knows {known}; give the tokenizer"
            " that belongs to the model"
        )
