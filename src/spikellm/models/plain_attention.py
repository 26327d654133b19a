"""Seeing what goes into attention that does not spike, while the model library computes it as it
always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Operands(NamedTuple):
    """What goes into attention, ``(batch, heads, tokens, channels)`` each; heads of K and V may be
    fewer.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def library_computes(implementation: str) -> bool:
    """Whether an implementation is a function that all families share, which eager ones are not."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return implementation in ALL_ATTENTION_FUNCTIONS


@contextmanager
def watching_plain(decoder: Any, watcher: Callable[[nn.Module, Operands], None]) -> Iterator[None]:
    """While this holds, ``watcher`` is shown what goes into the attention modules of a decoder
    whose implementation the :func:`library_computes`.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, own = str(decoder.config._attn_implementation), set(decoder.modules())
    before = ALL_ATTENTION_FUNCTIONS[name]

    def watched(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *more: Any, **keywords: Any
    ) -> Any:
        if module in own:
            watcher(module, Operands(query, key, value))
        return before(module, query, key, value, *more, **keywords)

    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = before
