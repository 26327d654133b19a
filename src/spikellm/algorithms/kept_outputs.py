"""What fitted layers and attention gave, kept while the layers behind them are fitted: a block that
is run again is run from where it changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from spikellm.models.attention_product import keeping_attention
from spikellm.nn.hooks import replaced_forward


class KeptOutputs:
    """Outputs by batch of windows and module, in the order of its calls.

    Attributes:
        room: bytes that may still be kept; beyond them modules run again.
    """

    def __init__(self) -> None:
        self.room = 0
        self._kept: dict[tuple[int, nn.Module], list[Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Bytes that are kept."""
        return sum(x.numel() * x.element_size() for every in self._kept.values() for x in every)

    @contextmanager
    def of(
        self, batch: int, final: Collection[nn.Module], pending: Collection[nn.Module]
    ) -> Iterator[None]:
        """While this holds, the block runs once on a batch: modules that ran on it before give
        what they gave.

        Args:
            final: modules whose outputs will not change any more if what they are fed does not.
            pending: modules that will change; once one of them has run, nothing is kept.
        """
        calls: dict[nn.Module, int] = {}
        changing: list[nn.Module] = []

        def once(module: nn.Module, run: Callable[..., Any], *given: Any, **named: Any) -> Any:
            place = calls[module] = calls.get(module, -1) + 1
            kept = self._kept.setdefault((batch, module), [])
            if place < len(kept):
                return kept[place]
            output = run(*given, **named)
            if not changing and isinstance(output, Tensor) and place == len(kept):
                size = output.numel() * output.element_size()
                if size <= self.room:
                    self.room -= size
                    kept.append(output)
            return output

        handles = [
            module.register_forward_pre_hook(lambda module, _: changing.append(module))
            for module in pending
        ]
        try:
            with ExitStack() as stack:
                stack.enter_context(keeping_attention(once))
                for module in final:
                    stack.enter_context(replaced_forward([module], partial(partial, once, module)))
                yield
        finally:
            for handle in handles:
                handle.remove()
