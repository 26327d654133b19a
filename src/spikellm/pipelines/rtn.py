"""Round to nearest: weights coded by the range of each row (and group), nothing learned. The fastest pipeline and everyone's baseline."""

from __future__ import annotations

from torch import nn

from spikellm.modeling.families import weight_and_bias
from spikellm.modeling.linear import SpikingLinear
from spikellm.modeling.swap import spiking_like
from spikellm.pipelines.base import BlockContext, FittedBlock, Pipeline, pipelines
from spikellm.pipelines.grouping import Groups, choose_groups, coding_of
from spikellm.recipe import LinearRecipe


@pipelines.register("rtn")
class RoundToNearest(Pipeline):
    """Needs inputs only where channels are to be ranked."""

    fits_alone = True

    def observes(self, settings: LinearRecipe) -> bool:
        return settings.activations.salient_rate + settings.weights.salient_rate > 0

    def fit_block(self, context: BlockContext) -> FittedBlock:
        groups = choose_groups(context, lambda name: (context.sample(name), weight_and_bias(context.layers[name])[0]))
        return FittedBlock(
            {name: fit_layer(context.layers[name], context.settings[name], own) for _, shared in groups for name, own in shared.items()}
        )


def fit_layer(module: nn.Module, settings: LinearRecipe, groups: Groups) -> SpikingLinear:
    """Spiking layer of one linear layer."""
    weight, _ = weight_and_bias(module)
    layer = spiking_like(module, settings)
    layer.set_groups(*groups)
    layer.set_weights(coding_of(settings, groups).code(weight.detach(), None))
    return layer
