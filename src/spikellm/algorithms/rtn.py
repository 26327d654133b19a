"""Round to nearest: weights coded by the range of each row (and group), nothing learned.

The fastest algorithm and everyone's baseline.
"""

from __future__ import annotations

from typing import Literal

from spikellm.algorithms.base import Algorithm, BlockContext, FittedBlock, algorithms
from spikellm.algorithms.channel_choice import choose_groups
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
    """Needs inputs only where channels are to be ranked, ranges to be searched or massive tokens to
    be told.
    """

    fits_alone = True

    def needs_inputs(self, settings: LinearRecipe) -> bool:
        activations = settings.activations
        ranks = activations.salient_rate + settings.weights.salient_rate > 0
        return ranks or activations.search_range or activations.token_steps > 0

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
