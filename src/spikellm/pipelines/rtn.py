"""Round to nearest: weights coded by the range of each row (and group), nothing learned. The fastest pipeline and everyone's baseline."""

from __future__ import annotations

from torch import Tensor, nn

from spikellm.modeling.families import weight_and_bias
from spikellm.modeling.linear import SpikingLinear
from spikellm.modeling.swap import spiking_like
from spikellm.pipelines.base import BlockContext, FittedBlock, pipelines
from spikellm.pipelines.grouping import assign_groups, salient_channels
from spikellm.quantization.affine import round_to_nearest
from spikellm.recipe import LinearRecipe


@pipelines.register("rtn")
class RoundToNearest:
    """Needs inputs only where channels are to be ranked."""

    def observes(self, settings: LinearRecipe) -> bool:
        return settings.activations.salient_rate > 0

    def fit_block(self, context: BlockContext) -> FittedBlock:
        return FittedBlock(
            {
                name: fit_layer(
                    name,
                    module,
                    context.settings[name],
                    context.sample(name) if self.observes(context.settings[name]) else None,
                    context.recipe.seed,
                )
                for name, module in context.layers.items()
            }
        )

    def finish(self, model: nn.Module) -> None:
        """Nothing is left to do."""


def fit_layer(name: str, module: nn.Module, settings: LinearRecipe, x: Tensor | None, seed: int) -> SpikingLinear:
    """Spiking layer of one linear layer; ``x`` are sampled inputs, needed where the recipe asks for salient channels."""
    weight, _ = weight_and_bias(module)
    layer = spiking_like(module, settings)
    assign_groups(layer, None if x is None else salient_channels(x, weight, settings.activations, seed, name))
    layout = layer.layout()
    stored = weight.detach() if layout.order is None else weight.detach().index_select(1, layout.order)
    layer.set_weights(round_to_nearest(stored, settings.weights.bits, layout.weight_groups, symmetric=settings.weights.symmetric))
    return layer
