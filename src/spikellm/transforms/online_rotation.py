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
from spikellm.models.families import block_roles, is_linear, weight_and_bias
from spikellm.models.rounding import fit_layer
from spikellm.models.swap import replace_module
from spikellm.nn.channels import Groups, Sample, group_of, salient_channels, seed_of
from spikellm.nn.formats.affine_options import AffineOptions
from spikellm.nn.rotation import Rotated, Rotation, layer_name, rotation_of
from spikellm.quantization.hadamard import random_signs
from spikellm.recipe import LinearRecipe
from spikellm.saliency import salient_count
from spikellm.transforms.base import ModelState, Transform, transforms
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.options import OnlineRotationOptions

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
        for role in self.options.layers:
            names = [self._layer(state, index, role) for index in range(len(state.blocks.modules))]
            wanted = [name for name in names if state.recipe.for_module(name) is not None]
            if not wanted:
                raise RequestError(
                    f"online-rotation names {role!r}, and the recipe converts no such layer; leave"
                    " it out"
                )
            for name in wanted:
                layer = state.model.get_submodule(name)
                weight, _ = weight_and_bias(layer)
                rotation = Rotation(weight.shape[1], weight.device)
                replace_module(state.model, name, Rotated(rotation, layer))

    @staticmethod
    def _layer(state: ModelState, index: int, role: str) -> str:
        """Full name of the layer of this role in one block."""
        block = state.blocks.modules[index]
        roles = block_roles(block)
        if role not in roles or not is_linear(block.get_submodule(roles[role])):
            raise UnsupportedModelError(
                f"online-rotation names {role!r}, and {type(block).__name__} has no such layer that"
                " is known; leave it out of the recipe"
            )
        return f"{state.blocks.name}.{index}.{roles[role]}"

    def observes(self, state: BlockState) -> Collection[str]:
        return self.options.layers

    def prepare_block(self, state: BlockState) -> None:
        rotated = self._rotated[state.plan.name] = {}
        for role in self.options.layers:
            name = state.roles[role]
            full = state.full_name(name)
            if full not in state.plan.linears:
                continue
            weight, settings = state.fusion.weight(name), state.plan.linears[full]
            signs = choose_signs(
                Trial(full, state.inputs[role], weight, settings, state.recipe.seed),
                self.options.choose,
            )
            rotation = state.module.get_submodule(rotation_of(name))
            assert isinstance(rotation, Rotation)
            state.online[name] = rotation, signs
            state.fusion.columns(name, Rotation.of(signs))
            rotated[layer_name(full)] = int((signs > 0).sum())

    def in_words(self) -> str:
        return f"inputs of {' and '.join(self.options.layers)} layers rotated"

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
        group = torch.zeros_like(signs)
        if activations.salient_rate > 0 and not activations.allocated_over_model:
            sample = Sample(turned, columns)
            group = group_of(salient_channels(sample, activations, self.seed, self.name))
        outputs, inputs = self.weight.shape
        dense = nn.Linear(inputs, outputs, bias=False, device=self.weight.device)
        dense.weight = nn.Parameter(columns, requires_grad=False)
        bits = min(max(self.settings.weights.bits, _LEAST_BITS), _MOST_BITS)
        plain = LinearRecipe(weights=AffineOptions(bits=bits), activations=activations)
        found = fit_layer(dense, plain, Groups(group, None))(turned)
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
