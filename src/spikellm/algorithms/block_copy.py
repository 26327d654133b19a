"""A copy of a block to learn on: its linear layers code their inputs as the spiking ones will, and
it runs with whatever parameters it is given.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spikellm.algorithms.base import BlockContext
from spikellm.models.families import weight_and_bias
from spikellm.models.swap import replace_module
from spikellm.nn.fake_quant import FakeQuantLinear
from spikellm.transforms.smoothing import State


class BlockCopy:
    """A float32 copy of a block.

    Attributes:
        block: the copy.
        names: full name of each layer to convert, by its name within the block.
        layers: what stands in for them; their coders are to be set.
        state: parameters of the copy.

    Args:
        precision: type of the products of linear layers, by its name in torch.
    """

    def __init__(self, context: BlockContext, precision: str) -> None:
        self._forward = context.forward
        self.names = {name.removeprefix(f"{context.name}."): name for name in context.layers}
        self.block = copy.deepcopy(context.module).float()
        self.layers: dict[str, FakeQuantLinear] = {}
        for name in self.names:
            self.layers[name] = FakeQuantLinear(
                *weight_and_bias(self.block.get_submodule(name)), getattr(torch, precision)
            )
            replace_module(self.block, name, self.layers[name])
        for parameter in self.block.parameters():
            parameter.requires_grad_(False)
        self.state: State = dict(self.block.named_parameters())

    def run(self, state: State, hidden: Tensor) -> Tensor:
        """The output of the block with these parameters."""
        try:
            return self._forward(_Functional(self.block, state), hidden.float())
        finally:
            for layer in self.layers.values():
                if layer.coder is not None:
                    layer.coder.forget()


class _Functional(nn.Module):
    """A block run with other parameters than its own."""

    def __init__(self, block: nn.Module, state: State) -> None:
        super().__init__()
        self.block, self.state = block, state

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return functional_call(self.block, self.state, arguments, keywords)
