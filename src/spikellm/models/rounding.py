"""One layer rounded to nearest."""

from __future__ import annotations

from torch import nn

from spikellm.models.families import weight_and_bias
from spikellm.models.swap import spiking_like
from spikellm.nn.channels import Groups, coding_of
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import LinearRecipe


def fit_layer(module: nn.Module, settings: LinearRecipe, groups: Groups) -> SpikingLinear:
    """Spiking layer of one linear layer."""
    weight, _ = weight_and_bias(module)
    layer = spiking_like(module, settings)
    layer.set_groups(*groups)
    layer.set_weights(coding_of(settings, groups).code(weight.detach(), None))
    return layer
