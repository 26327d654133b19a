"""Put spiking layers in the place of linear ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spikellm.models.families import weight_and_bias
from spikellm.nn.channels import Groups
from spikellm.nn.formats import format_of
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import LinearRecipe


def spiking_like(
    module: nn.Module,
    settings: LinearRecipe,
    device: object = None,
    sizes: tuple[int, ...] = (),
    *,
    biased: bool = False,
) -> SpikingLinear:
    """An empty spiking layer of the shape, bias and type of a linear one.

    Args:
        device: where; the module's own by default.
        sizes: see ``SpikingLinear.sizes``.
        biased: it has a bias, even if the linear layer has none.
    """
    weight, bias = weight_and_bias(module)
    layer = SpikingLinear(
        weight.shape[1],
        weight.shape[0],
        settings,
        bias=biased or bias is not None,
        dtype=weight.dtype,
        device=device if device is not None else weight.device,
        sizes=sizes,
    )
    if bias is not None and layer.bias is not None and not bias.is_meta:
        layer.bias.data.copy_(bias.data)
    return layer


def spiking_for(
    module: nn.Module, settings: LinearRecipe, state: Mapping[str, Tensor], device: object = None
) -> SpikingLinear:
    """An empty spiking layer, see :func:`spiking_like`, of the sizes that a state has, and with a
    bias if that has one.
    """
    sizes = format_of(settings.weights).sizes_of(state)
    return spiking_like(module, settings, device, sizes, biased="bias" in state)


def fitted_layer(
    module: nn.Module,
    settings: LinearRecipe,
    groups: Groups,
    weights: Any,
    device: object = None,
) -> SpikingLinear:
    """The spiking layer that a linear one becomes, of the sizes that its format answers.

    Args:
        groups: of its input channels.
        weights: coded for these groups, of the kind that the format takes over.
        device: see :func:`spiking_like`.
    """
    stored = format_of(settings.weights)
    if not stored.keeps_steps(settings.weights):
        groups = groups._replace(column_steps=None)
    sizes = stored.fitted_sizes(weights, groups.column_steps)
    layer = spiking_like(module, settings, device, sizes)
    layer.set_groups(*groups)
    layer.set_weights(weights)
    return layer


def with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A module like another, which is not changed, with other parameters of its own."""
    new = copy.copy(module)
    new._parameters = {
        **module._parameters,
        **{name: nn.Parameter(value, requires_grad=False) for name, value in values.items()},
    }
    return new


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with this full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, leaf, module)


def put_parameters(root: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters, by full name, other values: vectors in place, matrices in a new layer, so
    that the layer as it was stays as it was.
    """
    for name, value in values.items():
        if value.dim() == 1:
            root.get_parameter(name).data.copy_(value)
        else:
            owner, _, leaf = name.rpartition(".")
            old = root.get_submodule(owner)
            new = {leaf: value.to(old.get_parameter(leaf).device)}
            replace_module(root, owner, with_parameters(old, new))
