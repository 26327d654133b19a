"""One rotation for all heads of V, fused into the value and the output layer (QuaRot); behind a map
of its own for each head, if that is asked for, with which heads and output layer are balanced
(:mod:`spikellm.quantization.balance`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from spikellm.core.errors import UnsupportedModelError
from spikellm.quantization.balance import balanced_map
from spikellm.quantization.hadamard import random_signs, spread
from spikellm.transforms.base import Transform, transforms
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.fusion import by_head
from spikellm.transforms.options import ValueOutputRotationOptions
from spikellm.transforms.value_heads import ValueHeads, find_value_heads


@transforms.register("value-output-rotation")
class ValueOutputRotation(Transform[ValueOutputRotationOptions]):
    """Costs nothing at run time."""

    Options = ValueOutputRotationOptions

    def in_words(self) -> str:
        balanced = " and balanced" if self.options.basis == "balanced" else ""
        return f"heads of V rotated{balanced} (fused)"

    def observes(self, state: BlockState) -> Collection[str]:
        return ("output", "value-heads") if self.options.basis == "balanced" else ()

    def prepare_block(self, state: BlockState) -> None:
        heads = find_value_heads(state)
        if heads is None and state.recipe.adapt:
            state.notes.append("value-output-rotation: no heads of V that are known stand between")
            return
        if heads is None:
            raise UnsupportedModelError(
                f"{type(state.module).__name__} has no value layer of its own, so nothing can be"
                " fused between value and output; leave value-output-rotation out of the recipe"
            )
        signs = random_signs(heads.channels, state.recipe.seed + 1)

        def rotate(x: Tensor) -> Tensor:
            return spread(x * signs.to(x))

        if self.options.basis == "balanced":
            _balance(state, heads)
        by_heads = by_head(rotate, heads.channels)
        state.fusion.rows(heads.value, by_heads)
        state.fusion.columns(heads.output, by_heads)
        if "output" in state.inputs:
            state.inputs["output"] = by_heads(state.inputs["output"])


def _balance(state: BlockState, heads: ValueHeads) -> None:
    """Let a map stand between each head of V and the columns of the output layer that read it."""
    if "value-heads" not in state.inputs:
        state.notes.append(
            "value-output-rotation: V is not seen where attention is not reached, so its heads are"
            " not balanced"
        )
        return
    fusion, coded = state.fusion, state.coded("output")
    given = state.inputs["value-heads"]
    values = (given - given.mean(0)).unflatten(1, (-1, heads.channels)).transpose(0, 1)
    outputs = coded.unflatten(1, (len(values), -1, heads.channels)).transpose(0, 1).flatten(1, 2)
    read = fusion.weight(heads.output).T.unflatten(0, (len(values), -1, heads.channels))
    energy = (read @ read.transpose(-1, -2)).sum(1)
    moments = [x.transpose(1, 2) @ x for x in (values, outputs)]
    moments = [one / _traces(one) for one in moments]
    forward = balanced_map(moments[0] + moments[1], energy)
    back = torch.linalg.inv(forward)
    # heads share the range of what the output layer reads: their scales make them even there
    power = _traces(forward @ (outputs.transpose(1, 2) @ outputs) @ forward)
    level = (power / _traces(back @ energy @ back).clamp(min=1e-300)) ** 0.25
    level = level.clamp(min=1e-12)
    level = level / level.log().mean().exp()
    forward, back = forward / level, back * level

    def by_value_head(x: Tensor, each: Tensor, shared: int) -> Tensor:
        parts = x.unflatten(-1, (-1, shared, heads.channels))
        return torch.einsum("...hsc,hcd->...hsd", parts, each).flatten(-3)

    fusion.rows(heads.value, lambda x: by_value_head(x, forward, 1))
    fusion.columns(heads.output, lambda x: by_value_head(x, back, heads.shared))
    state.inputs["output"] = by_value_head(state.inputs["output"], forward, heads.shared)


def _traces(matrices: Tensor) -> Tensor:
    """``(heads, n, n)`` → ``(heads, 1, 1)``."""
    return matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
