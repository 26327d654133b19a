"""Round to nearest: weights coded by the range of each row (and group), nothing learned.

The fastest algorithm and everyone's baseline.
"""

from __future__ import annotations

from typing import Literal

from spikellm.algorithms.base import Algorithm, BlockContext, FittedBlock, algorithms
from spikellm.algorithms.channel_choice import choose_groups, needs_inputs
from spikellm.models.families import weight_and_bias
from spikellm.models.rounding import fit_layer
from spikellm.recipe import LinearRecipe
from spikellm.recipe.base import AlgorithmOptions, register_options


@register_options
class RtnOptions(AlgorithmOptions):
    """Nothing to choose."""

    name: Literal["rtn"] = "rtn"


@algorithms.register("rtn")
class RoundToNearest(Algorithm):
    """Needs inputs only where channels are to be ranked or clustered, ranges to be searched,
    thresholds to be fixed or massive tokens to be told.
    """

    fits_alone = True

    def needs_inputs(self, settings: LinearRecipe) -> bool:
        return needs_inputs(settings.activations) or settings.weights.salient_rate > 0

    def fit_block(self, context: BlockContext) -> FittedBlock:
        groups = choose_groups(
            context, lambda name: (context.sample(name), weight_and_bias(context.layers[name])[0])
        )
        return FittedBlock(
            {
                name: fit_layer(context.layers[name], context.settings[name], own)
                for _, shared in groups
                for name, own in shared.items()
            }
        )
