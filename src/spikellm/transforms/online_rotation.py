"""Rotations that run with the model: the inputs of a layer are spread over each other before they
are coded (QuaRot's online Hadamard transform).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.models.families import (
    INPUT_SITES,
    block_roles,
    is_linear,
    site_layers,
    weight_and_bias,
)
from spikellm.models.rounding import fit_layer
from spikellm.models.swap import replace_module
from spikellm.nn.channels import Groups, Sample, grouped, seed_of
from spikellm.nn.constant_thresholds import constant_thresholds
from spikellm.nn.formats.affine_options import AffineOptions
from spikellm.nn.rotation import Rotated, Rotation, layer_name, rotation_of
from spikellm.quantization.hadamard import random_signs
from spikellm.recipe import LinearRecipe
from spikellm.saliency import salient_count
from spikellm.transforms.base import ModelState, Transform, transforms
from spikellm.transforms.block_state import BlockState, OnlineSetting
from spikellm.transforms.options import OnlineRotationOptions

_WORDS: dict[str, str] = {
    "attention-input": "query, key, value",
    "feedforward-input": "gate, up",
    "output": "output",
    "down": "down",
}
_TOKENS = 1024  # on which a choice is measured
_LEAST_BITS, _MOST_BITS = 2, 8  # of the plain codes that stand in for any format's in a trial


@transforms.register("online-rotation")
class OnlineRotation(Transform[OnlineRotationOptions]):
    """Rotations before the layers that a recipe names, and against them in those layers' weights.

    Which channels are rotated is chosen when a block is prepared.
    """

    Options = OnlineRotationOptions

    def __init__(self, options: OnlineRotationOptions) -> None:
        super().__init__(options)
        self._rotated: dict[str, dict[str, int]] = {}

    def insert(self, state: ModelState) -> None:
        """Put a rotation that does nothing yet before every layer of the roles named.

        Raises:
            UnsupportedModelError: a block has no layer of that role.
            RequestError: the recipe converts no layer of that role.
        """
        for site in self.options.layers:
            names = [
                name
                for index in range(len(state.blocks.modules))
                for name in self._layers(state, index, site)
            ]
            if not names:
                if state.recipe.adapt:
                    continue  # each block says so
                raise UnsupportedModelError(
                    f"online-rotation names {site!r}, and {type(state.blocks.modules[0]).__name__}"
                    " has no such layer that is known; leave it out of the recipe"
                )
            wanted = [name for name in names if state.recipe.for_module(name) is not None]
            if not wanted:
                raise RequestError(
                    f"online-rotation names {site!r}, and the recipe converts no such layer; leave"
                    " it out"
                )
            for name in wanted:
                layer = state.model.get_submodule(name)
                weight, _ = weight_and_bias(layer)
                rotation = Rotation(weight.shape[1], weight.device)
                replace_module(state.model, name, Rotated(rotation, layer))

    @staticmethod
    def _layers(state: ModelState, index: int, site: str) -> list[str]:
        """Full names of the layers of one block that read this site."""
        block = state.blocks.modules[index]
        return [
            f"{state.blocks.name}.{index}.{name}"
            for name in site_layers(block_roles(block), site)
            if is_linear(block.get_submodule(name))
        ]

    def observes(self, state: BlockState) -> Collection[str]:
        roles = [self._role(state, site) for site in self.options.layers]
        return [role for role in roles if role is not None]

    @staticmethod
    def _role(state: BlockState, site: str) -> str | None:
        """The role under which a site is observed: of the first layer that reads it."""
        return next((role for role in INPUT_SITES[site] if role in state.roles), None)

    def prepare_block(self, state: BlockState) -> None:
        rotated = self._rotated[state.plan.name] = {}
        for site in self.options.layers:
            names = [
                name
                for name in site_layers(state.roles, site)
                if state.full_name(name) in state.plan.linears
            ]
            role = self._role(state, site)
            if role is None:
                state.notes.append(f"online-rotation: no layer of this block reads the {site} site")
            if role is None or not names:
                continue
            x, first = state.inputs[role], state.full_name(names[0])
            mean = x.mean(0) if self.options.center else None
            x = x if mean is None else x - mean
            weight = torch.cat([state.fusion.weight(name) for name in names])
            trial = Trial(first, x, weight, state.plan.linears[first], state.recipe.seed)
            signs = choose_signs(trial, self.options.choose)
            for name in names:  # all read the same tensor, so all are behind the same rotation
                rotation = state.module.get_submodule(rotation_of(name))
                assert isinstance(rotation, Rotation)
                turn = Rotation.of(signs)
                if mean is not None:
                    state.fusion.shift(name, state.fusion.weight(name) @ mean)
                offset = None if mean is None else turn(mean[None])[0]
                state.online[name] = OnlineSetting(rotation, signs, offset)
                state.fusion.columns(name, turn)
                rotated[layer_name(state.full_name(name))] = int((signs > 0).sum())

    def in_words(self) -> str:
        return (
            f"inputs of {' and '.join(_WORDS[site] for site in self.options.layers)} layers"
            f" {'centered and ' if self.options.center else ''}rotated"
        )

    def record(self, block: str) -> dict[str, int]:
        return self._rotated.get(block, {})


@dataclass(frozen=True)
class Trial:
    """A layer before whose inputs rotations are tried.

    Attributes:
        name: its full name.
        x: sampled inputs, float64, ``(tokens, in)``.
        weight: float64, ``(out, in)``.
        settings: its recipe.
        seed: of signs, and of criteria that draw at random.
    """

    name: str
    x: Tensor
    weight: Tensor
    settings: LinearRecipe
    seed: int

    @cached_property
    def exact(self) -> Tensor:
        """What the layer gives, ``(tokens, out)``."""
        return self.x @ self.weight.T

    def loss(self, signs: Tensor) -> float:
        """Squared error of the layer behind this rotation, weights rounded to nearest as plain
        integers of about as many bits as the format's, whatever that is.
        """
        activations = self.settings.activations
        rotation = Rotation.of(signs)
        turned, columns = rotation(self.x).float(), rotation(self.weight).float()
        count = 0 if activations.allocated_over_model else None  # not known yet
        group = grouped(Sample(turned, columns), activations, self.seed, self.name, count)
        fixed = None
        if activations.static:
            fixed = constant_thresholds(activations, group, turned, columns)
        outputs, inputs = self.weight.shape
        dense = nn.Linear(inputs, outputs, bias=False, device=self.weight.device)
        dense.weight = nn.Parameter(columns, requires_grad=False)
        bits = min(max(self.settings.weights.bits, _LEAST_BITS), _MOST_BITS)
        plain = LinearRecipe(weights=AffineOptions(bits=bits), activations=activations)
        found = fit_layer(dense, plain, Groups(group, None, fixed=fixed))(turned)
        return float((found - self.exact).square().sum())

    def candidates(self, everything: Tensor) -> Iterator[Tensor]:
        """All channels, none, or all but the largest, where the settings let as many of this
        layer's channels have a range of their own.
        """
        yield everything
        yield torch.zeros_like(everything)
        activations = self.settings.activations
        if (
            activations.salient_rate == 0
            or activations.thresholds != "split"
            or activations.allocated_over_model
        ):
            return  # allocated over the model, this layer's share is not known yet
        largest = torch.sort(self.x.abs().amax(0), descending=True, stable=True).indices
        count = 1
        while count <= salient_count(activations.salient_rate, self.x.shape[1]):
            yield everything.index_fill(0, largest[:count], 0)
            count *= 2


def choose_signs(trial: Trial, choose: str) -> Tensor:
    """Signs of :class:`spikellm.nn.rotation.Rotation`, uint8 ``(in,)``.

    Args:
        choose: ``"all"``, or ``"loss"``: the candidate that loses least on the sample.
    """
    x = trial.x
    signs = random_signs(x.shape[1], seed_of(trial.name, trial.seed))
    everything = torch.where(signs > 0, 1, 2).to(torch.uint8).to(x.device)
    if choose == "all":
        return everything
    trial = replace(trial, x=x[:: -(-len(x) // _TOKENS)])
    losses = [
        (trial.loss(candidate), place, candidate)
        for place, candidate in enumerate(trial.candidates(everything))
    ]
    return min(losses)[2]
