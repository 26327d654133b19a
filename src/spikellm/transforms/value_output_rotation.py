"""One rotation for all heads of V, fused into the value and the output layer (QuaRot)."""

from __future__ import annotations

from torch import Tensor

from spikellm.core.errors import UnsupportedModelError
from spikellm.quantization.hadamard import random_signs, spread
from spikellm.transforms.base import Transform, transforms
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.fusion import by_head
from spikellm.transforms.options import ValueOutputRotationOptions
from spikellm.transforms.value_heads import find_value_heads


@transforms.register("value-output-rotation")
class ValueOutputRotation(Transform[ValueOutputRotationOptions]):
    """Costs nothing at run time."""

    Options = ValueOutputRotationOptions

    def in_words(self) -> str:
        return "heads of V rotated (fused)"

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

        by_heads = by_head(rotate, heads.channels)
        state.fusion.rows(heads.value, by_heads)
        state.fusion.columns(heads.output, by_heads)
        if "output" in state.inputs:
            state.inputs["output"] = by_heads(state.inputs["output"])
