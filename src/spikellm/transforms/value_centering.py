"""V without its mean, fused: rows of attention sum to one, so a constant c taken away from every
row of V is taken away from what attention gives, and the output layer's bias adds ``W c`` again.

What is left is coded in a smaller range, in V, in the cache and before the output layer.
"""

from __future__ import annotations

from collections.abc import Collection

from spikellm.transforms.base import Transform, transforms
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.fusion import Fusion
from spikellm.transforms.options import ValueCenteringOptions
from spikellm.transforms.value_heads import find_value_heads


@transforms.register("value-centering")
class ValueCentering(Transform[ValueCenteringOptions]):
    """Costs nothing at run time; put into the block at once, and kept if that changes nothing: rows
    of attention that do not sum to one (sinks) do not let a constant through.
    """

    Options = ValueCenteringOptions

    def observes(self, state: BlockState) -> Collection[str]:
        return ("output", "value-heads")

    def in_words(self) -> str:
        return "means taken away from V (fused)"

    def prepare_block(self, state: BlockState) -> None:
        if problem := _center(state):
            state.notes.append(f"value-centering: {problem}, so V keeps its mean")


def _center(state: BlockState) -> str | None:
    """Center V; says why it cannot."""
    heads = find_value_heads(state)
    if heads is None or "output" not in state.inputs:
        return "no heads of V that are known stand before this block's output layer"
    if (
        not {state.full_name(heads.value), state.full_name(heads.output)}
        <= state.plan.linears.keys()
    ):
        return "its value and output layers are not both converted"
    fusion, inputs = Fusion(state.module), state.inputs["output"]
    if "value-heads" in state.inputs:
        mean = state.inputs["value-heads"].mean(0)
    else:  # attention is not reached: what it gives has about the mean of V
        mean = heads.summed(inputs.mean(0)) / heads.shared
    wide = heads.repeated(mean)
    fusion.shift(heads.value, -mean)
    fusion.shift(heads.output, fusion.weight(heads.output) @ wide)
    if not state.put_if_equal(fusion):
        return "what stands between this block's value and output layers lets no constant through"
    state.inputs["output"] = inputs - wide
    if "value-heads" in state.inputs:
        state.inputs["value-heads"] = state.inputs["value-heads"] - mean
    return None
