"""Equivalent scalings (LET) of one block, as OmniQuant starts, applies and settles them.

Names of layers are those within the block, unless they are called full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikellm.algorithms.base import BlockContext
from spikellm.algorithms.omniquant_options import OmniQuantOptions
from spikellm.core import distributed
from spikellm.models.attention_interface import uncoded
from spikellm.models.families import is_linear
from spikellm.transforms.pairs import find_pairs
from spikellm.transforms.smoothing import (
    Factors,
    Pair,
    State,
    apply_pairs,
    factors_of,
    smooth_scale,
)


def pairs_that_hold(
    context: BlockContext, block: nn.Module, run: Callable[[State, Tensor], Tensor]
) -> tuple[list[Pair], list[str]]:
    """Pairs that leave the block's function as it is, and the names of those that are dropped.

    Args:
        block: float32 copy of the block, whose linear layers have no coders yet.
        run: output of the copy with the given parameters in the place of its own.
    """
    options = context.recipe.options(OmniQuantOptions)
    if not options.let:
        return [], []
    hidden = distributed.broadcast(0, {"hidden": context.inputs[0]})[
        "hidden"
    ]  # what one rank drops all drop
    with uncoded(block):
        kept, dropped = find_pairs(
            block,
            context.heads,
            options.pairs,
            lambda _, state: run(state, hidden),
            context.recipe.seed,
        )
    touching = {
        pair.name
        for pair in kept
        if any(_stays(block, scaling.parameter) for scaling in pair.scalings)
    }
    return [pair for pair in kept if pair.name not in touching], [*dropped, *sorted(touching)]


def _stays(block: nn.Module, parameter: str) -> bool:
    """Whether a parameter belongs to a linear layer that the recipe leaves as it is."""
    return is_linear(block.get_submodule(parameter.rpartition(".")[0]))


@dataclass(frozen=True)
class BlockScalings:
    """The pairs of one block, and what their scales make of its parameters.

    Scales are float32, ``(length,)``, by name of pair; they are learned as logarithms.

    Attributes:
        state: the block's parameters before any scaling, float32.
    """

    context: BlockContext
    state: State
    pairs: list[Pair]

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that pairs touch."""
        return {scaling.parameter for pair in self.pairs for scaling in pair.scalings}

    def initial(self) -> dict[str, Tensor]:
        """Scales to start from."""
        return {pair.name: self._initial_scale(pair) for pair in self.pairs}

    def _initial_scale(self, pair: Pair) -> Tensor:
        """SmoothQuant's scale where layers read the scaled channels; 1 between q and k."""
        ones = torch.ones(pair.length, device=self.context.device)
        if not pair.consumers:
            return ones
        spread = {scaling.parameter: scaling.spread for scaling in pair.scalings}
        input_max, weight_max = torch.zeros_like(ones), torch.zeros_like(ones)
        for name in pair.consumers:
            index = spread[f"{name}.weight"].to(ones.device)
            inputs = self.context.sample(f"{self.context.name}.{name}").abs().amax(0)
            weights = self.state[f"{name}.weight"].abs().amax(0)
            input_max = torch.maximum(
                input_max, torch.zeros_like(ones).scatter_reduce(0, index, inputs, "amax")
            )
            weight_max = torch.maximum(
                weight_max, torch.zeros_like(ones).scatter_reduce(0, index, weights, "amax")
            )
        alpha = self.context.recipe.options(OmniQuantOptions).alpha
        return smooth_scale(input_max, weight_max, alpha)

    def factors(self, log_scales: Mapping[str, Tensor]) -> dict[str, Factors]:
        """What every parameter that pairs touch is multiplied by."""
        return factors_of(self.pairs, {name: log.exp() for name, log in log_scales.items()})

    def applied(self, log_scales: Mapping[str, Tensor]) -> State:
        """All parameters after scaling."""
        return apply_pairs(
            self.state, self.pairs, {name: log.exp() for name, log in log_scales.items()}
        )

    def settled(self, log_scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Learned scales, moved to where the vectors that stay dense end up once rounded to the
        model's own type, so that rounding cancels; logarithms.
        """
        scaled, settled = self.applied(log_scales), dict(log_scales)
        for pair in self.pairs:
            first = pair.scalings[0]
            if scaled[first.parameter].dim() != 1 or first.power > 0:
                continue
            own = self.context.module.get_parameter(first.parameter)
            rounded = scaled[first.parameter].to(own.dtype).float() + first.offset
            ratio = (self.state[first.parameter] + first.offset) / rounded
            usable = torch.isfinite(ratio) & (ratio > 0)
            settled[pair.name] = torch.where(
                usable, ratio.clamp(min=1e-30).log(), settled[pair.name]
            )
        return settled

    def input_scale(self, name: str, scales: Mapping[str, Tensor]) -> Tensor | None:
        """What the inputs of a layer are divided by; None for 1."""
        for pair in self.pairs:
            if name in pair.consumers:
                index = next(
                    scaling.spread
                    for scaling in pair.scalings
                    if scaling.parameter == f"{name}.weight"
                )
                return scales[pair.name][index]
        return None
