"""Layers behind a rotation that runs with the model."""

from __future__ import annotations

from torch import nn

from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.models.families import Blocks, block_roles, is_linear, weight_and_bias
from spikellm.models.swap import replace_module
from spikellm.nn.rotation import Rotated, Rotation
from spikellm.recipe import Recipe


def wrap_online(model: nn.Module, blocks: Blocks, recipe: Recipe) -> Blocks:
    """The same blocks, with a rotation that does nothing yet before every layer that the recipe
    rotates while the model runs.

    Raises:
        UnsupportedModelError: a block has no layer of that role.
        RequestError: the recipe converts no layer of that role.
    """
    wrapped = set[str]()
    for index, block in enumerate(blocks.modules):
        roles = block_roles(block)
        for role in recipe.rotation.online:
            name = f"{blocks.name}.{index}.{roles.get(role)}"
            if role not in roles or not is_linear(model.get_submodule(name)):
                raise UnsupportedModelError(
                    f"rotation.online names {role!r}, and {type(block).__name__} has no such layer"
                    " that is known; leave it out of the recipe"
                )
            if recipe.for_module(name) is not None:
                layer = model.get_submodule(name)
                weight = weight_and_bias(layer)[0]
                replace_module(
                    model, name, Rotated(Rotation(weight.shape[1], weight.device), layer)
                )
                wrapped.add(role)
    for role in recipe.rotation.online:
        if role not in wrapped:
            raise RequestError(
                f"rotation.online names {role!r}, and the recipe converts no such layer; leave"
                " it out"
            )
    return blocks
