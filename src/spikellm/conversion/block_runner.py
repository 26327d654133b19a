"""Run decoder blocks one at a time, outside their model, exactly as the model runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spikellm.core.errors import UnsupportedModelError
from spikellm.core.offload import release, released_after_forward
from spikellm.models.attention_product import output_only
from spikellm.models.families import Blocks, decoder_of
from spikellm.nn.hooks import first_input, first_output

_BATCH_TOKENS = 2048
# the same operations in the same order: only a device that sums in another order differs at all
_TOLERANCE = 1e-2


class Call(NamedTuple):
    """What a block is called with beside its hidden states.

    Masks and positions, the same for every batch of one size.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def batch_windows(seqlen: int) -> int:
    """Windows that are run at a time."""
    return max(1, _BATCH_TOKENS // seqlen)


class BlockRunner:
    """Inputs of the first block, batch by batch, and how every block is called.

    Args:
        model: the full-precision model, in evaluation mode.
        blocks: its decoder blocks.
        windows: tokens, ``(windows, seqlen)``; run in batches of about 2,048 tokens.
        sizes: other numbers of windows that :meth:`forward` will be asked for.

    Raises:
        UnsupportedModelError: the blocks one by one do not give what the whole model gives: the
            family passes something between blocks that is not replayed.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, blocks: Blocks, windows: Tensor, sizes: Iterable[int] = ()
    ) -> None:
        home = next(model.parameters()).device
        self._model, self._first = model, blocks.modules[0]
        self.batches = windows.to(home).split(batch_windows(windows.shape[1]))
        self._calls: dict[int, list[Call]] = {}
        for size in {batch.shape[0] for batch in self.batches} | {
            size for size in sizes if 0 < size <= self.batches[0].shape[0]
        }:
            self._calls[size], output = _watch(model, blocks, self.batches[0][:size])
            if size == self.batches[0].shape[0]:
                expected = output
        self._verify(type(model).__name__, blocks, next(self.first_inputs()), expected)
        # other tokens, the same recorded call: what depends on the tokens would show
        other = self.batches[0][: min(self._calls)].flip(1)
        _, output = _watch(model, blocks, other)
        self._verify(type(model).__name__, blocks, input_of(model, self._first, other), output)

    def first_inputs(self) -> Iterator[Tensor]:
        """What the first block is fed, each batch computed when it is asked for."""
        return (input_of(self._model, self._first, batch) for batch in self.batches)

    def forward(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Output hidden states of block ``index`` (or a stand-in for it) on some windows, as many
        as a batch or one of ``sizes`` has.
        """
        call = self._calls[hidden.shape[0]][index]
        device = next(chain(block.parameters(), block.buffers())).device
        arguments, keywords = tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tuple(call)
        )
        with output_only():
            return _hidden(block(hidden.to(device), *arguments, **keywords))

    def _verify(self, kind: str, blocks: Blocks, hidden: Tensor, expected: Tensor) -> None:
        """Check on a batch, channel by channel, that blocks run one by one give what the whole
        model gives.
        """
        for index, block in enumerate(blocks.modules):
            hidden = self.forward(index, block, hidden)
            release(block)
        difference, size = (
            (t.float().abs().flatten(0, -2).amax(0)) for t in (hidden - expected, expected)
        )
        error = float((difference / size.clamp(min=1e-20)).max())
        if error >= _TOLERANCE:  # NaN passes: the block loop names the block that makes it
            raise UnsupportedModelError(
                f"{kind}: its blocks run one by one do not give what the whole model gives"
                f" (relative difference {error:.2g}); this family cannot be converted"
            )


@torch.no_grad()
def _watch(model: nn.Module, blocks: Blocks, batch: Tensor) -> tuple[list[Call], Tensor]:
    calls: list[Call] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = {name: value for name, value in keywords.items() if name != "hidden_states"}
        calls.append(Call(arguments[1:], keywords))

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        outputs.append(_hidden(output).detach())

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks.modules
    ]
    handles.append(blocks.modules[-1].register_forward_hook(after))
    try:
        with released_after_forward(blocks.modules):  # logits are not looked at
            first_output(decoder_of(model), lambda: model(batch, use_cache=False))
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(blocks.modules):
        raise UnsupportedModelError(
            f"{type(model).__name__} calls its {len(blocks.modules)} blocks {len(calls)} times in a"
            " pass; each must run once, in order"
        )
    return calls, outputs[0]


@torch.no_grad()
def input_of(model: nn.Module, module: nn.Module, batch: Tensor) -> Tensor:
    """What a module of a model is fed when the model runs on a batch of windows.

    What comes behind it is not run.
    """
    return first_input(module, lambda: model(batch, use_cache=False))


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(hidden, Tensor)
    return hidden
