"""What is to be converted in each block, decided and checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.models.attention_interface import CHILD, find_attention
from spikellm.models.families import Blocks, has_tied_head, linear_layers
from spikellm.models.swap import spiking_for
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.nn.rotation import Rotation, layer_name, rotation_of
from spikellm.recipe import AttentionRecipe, LinearRecipe, Recipe


class BlockPlan(NamedTuple):
    """Settings by full name: of the linear layers of a block, and of its attention modules.

    Heads of its attention where they are known.
    """

    name: str
    linears: dict[str, LinearRecipe]
    attentions: dict[str, tuple[HeadShape, AttentionRecipe]]
    heads: HeadShape | None

    @property
    def tells_massive_tokens(self) -> bool:
        """Whether massive tokens take more steps in any of its linear layers, or in K or V."""
        heads = (part for _, own in self.attentions.values() for part in (own.key, own.value))
        inputs = (settings.activations for settings in self.linears.values())
        return any(part.token_steps for part in (*inputs, *heads))

    @property
    def shares_steps_of_heads(self) -> bool:
        """Whether steps or spikes of K or V of its attention are shared out over the model."""
        return any(own.allocated_parts or own.priced_parts for _, own in self.attentions.values())

    def empty_modules(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        device: torch.device | str | None = None,
    ) -> dict[str, nn.Module]:
        """Modules of the converted block without their state (which is in ``tensors``, under full
        names), by the name under which they go into the model.
        """
        modules: dict[str, nn.Module] = {}
        for name, settings in self.linears.items():
            state = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.")
            }
            modules[name] = layer = spiking_for(model.get_submodule(name), settings, state, device)
            if layer_name(name) != name:
                rotation = rotation_of(name)
                modules[rotation] = Rotation(
                    layer.in_features,
                    layer.weight_scale.device,
                    centered=f"{rotation}.offset" in tensors,
                )
        for name, (shape, spiking) in self.attentions.items():
            place = (
                device
                if device is not None
                else next(model.get_submodule(name).parameters()).device
            )
            modules[f"{name}.{CHILD}"] = SpikingAttention(shape, spiking, place)
        return modules


def plan_blocks(
    model: Any, blocks: Blocks, recipe: Recipe, *, untied: bool = False
) -> list[BlockPlan]:
    """What each block becomes.

    Where attention is to spike, the model must use the attention interface already.

    Args:
        untied: the output projection will have a weight of its own when it is converted.

    Raises:
        UnsupportedModelError: a part that cannot be converted as asked.
        RequestError: an override that matches nothing, or nothing left to convert.
    """
    if recipe.lm_head and has_tied_head(model) and not untied:
        raise UnsupportedModelError(
            "lm_head is true, but the output projection shares its weight with the input embedding;"
            " leave lm_head false"
        )
    sites = _attention_sites(model, recipe)
    plan: list[BlockPlan] = []
    names: list[str] = []
    for index, block in enumerate(blocks.modules):
        prefix = f"{blocks.name}.{index}"
        full = [f"{prefix}.{name}" for name in linear_layers(block)]
        names += map(layer_name, full)
        plan.append(_plan_block(prefix, full, sites, recipe))
    head = output_head(model)
    if recipe.lm_head and head is not None:
        names.append(head)
    _require_matches(recipe, names, list(sites))
    if not any(block.linears or block.attentions for block in plan):
        raise RequestError("the recipe skips every layer, so there is nothing to convert")
    return plan


def _attention_sites(model: Any, recipe: Recipe) -> dict[str, HeadShape]:
    if not recipe.attention.spiking:
        return {}
    try:
        return find_attention(model)
    except UnsupportedModelError:
        if not recipe.adapt:
            raise
        return {}


def _plan_block(
    name: str, layers: Sequence[str], sites: Mapping[str, HeadShape], recipe: Recipe
) -> BlockPlan:
    linears = {
        layer: settings
        for layer in layers
        if (settings := recipe.for_module(layer_name(layer))) is not None
    }
    inside = {site: shape for site, shape in sites.items() if site.startswith(f"{name}.")}
    attentions = {
        site: (shape, spiking)
        for site, shape in inside.items()
        if (spiking := recipe.attention_for(site)) is not None
    }
    return BlockPlan(name, linears, attentions, next(iter(inside.values()), None))


def _require_matches(recipe: Recipe, layers: list[str], sites: list[str]) -> None:
    """Every override must match a layer, or skip an attention module."""
    unmatched = recipe.unmatched_overrides(layers, sites)
    if not unmatched:
        return
    hint = (
        "; it matches attention, which an override can only skip"
        if unmatched[0] not in recipe.unmatched_overrides(sites)
        else ""
    )
    raise RequestError(
        f"the override {unmatched[0]!r} matches no layer{hint}; names are like"
        f" {[*sites, *layers][-1]!r}"
    )


def plan_head(model: nn.Module, recipe: Recipe) -> BlockPlan | None:
    """What the output projection becomes, as a block of one layer; None if it stays.

    Raises:
        RequestError: the recipe asks for it, and there is none or an override skips it.
    """
    if not recipe.lm_head:
        return None
    name = output_head(model)
    settings = recipe.for_module(name) if name else None
    if name is None or settings is None:
        raise RequestError(
            "lm_head is true, but the model has no output projection or an override skips it"
        )
    return BlockPlan(name, {name: settings}, {}, None)


def output_head(model: nn.Module) -> str | None:
    """Full name of the output projection."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None)
