"""The heads of V between a block's value layer and its output layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import UnsupportedModelError
from spikellm.nn.rotation import layer_name
from spikellm.transforms.block_state import BlockState


class ValueHeads(NamedTuple):
    """Names of the two layers, channels of a head of V, and query heads that share one."""

    value: str
    output: str
    channels: int
    shared: int

    def summed(self, x: Tensor) -> Tensor:
        """``(…, query heads · channels)`` summed over the query heads that share a value head."""
        return torch.flatten(x.unflatten(-1, (-1, self.shared, self.channels)).sum(-2), -2)

    def repeated(self, x: Tensor) -> Tensor:
        """``(heads · channels,)`` repeated for the query heads that share a value head."""
        return x.view(-1, 1, self.channels).expand(-1, self.shared, self.channels).flatten()


def find_value_heads(state: BlockState) -> ValueHeads | None:
    """The heads of V; None where the block has no value or no output layer of its own.

    Raises:
        UnsupportedModelError: the block does not say how many channels a head has, and the recipe
            does not adapt: then None too.
    """
    if not {"value", "output"} <= state.roles.keys():
        return None
    value, output = state.roles["value"], state.roles["output"]
    attention = state.module.get_submodule(layer_name(value).rpartition(".")[0])
    channels = int(getattr(attention, "head_dim", 0))
    rows, columns = state.fusion.weight(value).shape[0], state.fusion.weight(output).shape[1]
    if channels < 1 or rows % channels or columns % rows:
        if state.recipe.adapt:
            return None
        raise UnsupportedModelError(
            f"{type(state.module).__name__} does not say how many channels a head of V has; leave"
            " value-output-rotation, and the site value-output of equalization, out of the recipe"
        )
    return ValueHeads(value, output, channels, columns // rows)
