"""One run of a decoder block recorded: its inputs and outputs, and those of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from spikellm.kernels.spec import ExecutionMode
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear


class BlockRecorder:
    """Context manager that records a run of a block.

    Attributes:
        arguments, keywords, output: of the block.
        inputs, outputs: of its spiking layers, by name within it.
        trains: spikes of its attention.
    """

    def __init__(self, block: nn.Module, layers: dict[str, SpikingLinear]) -> None:
        self._block = block
        self._names: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.trains: list[SpikeTrain] = []

    def __enter__(self) -> BlockRecorder:
        self._handles = [self._block.register_forward_hook(self._note_block, with_kwargs=True)]
        self._handles += [layer.register_forward_hook(self._note_layer) for layer in self._names]
        self._observing = observe_spikes(self.trains.append)
        self._observing.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._observing.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()

    def _note_block(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        self.arguments, self.keywords, self.output = arguments, keywords, output

    def _note_layer(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        name = self._names[layer]
        self.inputs[name], self.outputs[name] = arguments[0], output


@contextmanager
def in_execution_mode(
    block: nn.Module, layers: dict[str, SpikingLinear], mode: ExecutionMode
) -> Iterator[None]:
    """Run a block in one execution mode; afterwards each layer has its own again."""
    own = {name: layer.execution_mode for name, layer in layers.items()}
    if layers:
        set_execution_mode(block, mode)
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.execution_mode = own[name]


def hidden_states(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
