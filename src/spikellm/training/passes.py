"""Forward and backward passes of the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikellm.core.offload import released_after_forward
from spikellm.models.attention_product import output_only
from spikellm.models.families import find_blocks
from spikellm.models.next_token import piecewise_backward, piecewise_outputs
from spikellm.nn.hooks import replaced_forward
from spikellm.nn.trained import products_in
from spikellm.nn.vocabulary import CodedHead
from spikellm.recipe.training import StageOptions

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""Of logits, those of the original, ``(tokens, vocabulary)`` each, and targets, summed."""


class Passes:
    """Losses of windows, with and without gradients.

    Args:
        model: in evaluation mode.
        original: what it was converted from; None where the loss does not ask for it.
        loss: summed over tokens.
        options: type of products in passes with gradients, and whether blocks are recomputed.
        offloads: whether blocks of the original leave memory after use.
    """

    def __init__(
        self, model: Any, original: Any, loss: Loss, options: StageOptions, *, offloads: bool
    ) -> None:
        self._model, self._original, self._loss = model, original, loss
        self._products, self._recompute = getattr(torch, options.products), options.recompute
        self._offloads = offloads

    def backward(self, windows: Tensor, weight: float) -> float:
        """Gradients of ``weight`` times the summed loss of some windows ``(windows, tokens)``.

        Gives the summed loss.
        """
        with ExitStack() as stack:
            stack.enter_context(self._running())
            stack.enter_context(products_in(self._products))
            stack.enter_context(_decoded_head(self._model, self._products))
            if self._recompute:
                stack.enter_context(_recomputed(find_blocks(self._model).modules))
            wanted = self._wanted(windows)

            def loss(logits: Tensor, first: int) -> Tensor:
                return self._of_piece(logits, first, windows, wanted) * weight

            return piecewise_backward(self._model, windows, loss) / weight

    @torch.no_grad()
    def loss(self, windows: Tensor) -> float:
        """Summed loss of some windows, of the model as it will be saved."""
        with self._running():
            wanted, total = self._wanted(windows), 0.0
            for first, output in piecewise_outputs(self._model, windows, use_cache=False):
                total += float(self._of_piece(output.logits, first, windows, wanted))
        return total

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(output_only())
            if self._original is not None and self._offloads:
                stack.enter_context(released_after_forward(find_blocks(self._original).modules))
            yield

    def _wanted(self, windows: Tensor) -> Iterator[tuple[int, Any]] | None:
        if self._original is None:
            return None
        return piecewise_outputs(self._original, windows, use_cache=False)

    def _of_piece(
        self,
        logits: Tensor,
        first: int,
        windows: Tensor,
        wanted: Iterator[tuple[int, Any]] | None,
    ) -> Tensor:
        targets = windows[:, first + 1 : first + 1 + logits.shape[1]]
        count, goal = targets.shape[1], None
        if wanted is not None:
            with torch.no_grad():
                goal = next(wanted)[1].logits[:, :count].flatten(0, 1).to(logits.device)
        return self._loss(logits[:, :count].flatten(0, 1), goal, targets.flatten())


@contextmanager
def _decoded_head(model: Any, products: torch.dtype) -> Iterator[None]:
    """While this holds, an output projection of coded weights, which stay as they are, is decoded
    once and not for every piece of a loss.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, CodedHead):
        yield
        return
    weight = head.weight.to(products)
    bias = None if head.bias is None else head.bias.to(products)

    def run(x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(products), weight, bias).to(x.dtype)

    with replaced_forward([head], lambda _: run):
        yield


@contextmanager
def _recomputed(blocks: nn.ModuleList) -> Iterator[None]:
    """While this holds, of each block only inputs are kept; the rest is computed again for
    gradients.
    """

    def instead(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **keywords)
            own = copy_context()  # the backward pass may run in a thread that has another

            def again(*arguments: Any, **keywords: Any) -> Any:
                return own.copy().run(forward, *arguments, **keywords)

            return checkpoint(again, *arguments, use_reentrant=False, **keywords)

        return run

    with replaced_forward(list(blocks), instead):
        yield
