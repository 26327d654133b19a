"""Rotating within a block: scales and rotations between layers, and the rotations that run with the
model, fitted on what a stream brings to the block: the converted one, or the
full-precision one where all blocks are rotated before any is converted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core import distributed
from spikellm.core.errors import UnsupportedModelError
from spikellm.data.shards import WindowShard
from spikellm.models.attention_interface import Observation, observing
from spikellm.models.families import block_roles
from spikellm.models.plan import BlockPlan
from spikellm.nn.rotation import Rotation, layer_name, rotation_of
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.input_stats import SampledInputs, TokenSample
from spikellm.quantization.hadamard import random_signs, spread
from spikellm.recipe import Recipe
from spikellm.transforms.fusion import TOLERANCE, Forward, Fusion, by_head, difference, even_scale
from spikellm.transforms.online_rotation import choose_signs


class RotationResult(NamedTuple):
    """What rotating a block changed beyond the weights of layers that are to be converted.

    Attributes:
        rotations: rotations that run with the model, by full name.
        dense: parameters of layers that stay as they are, by full name.
        channels: how many channels of which layer's inputs are rotated.
        notes: what a user should know.
    """

    rotations: dict[str, nn.Module]
    dense: dict[str, Tensor]
    channels: dict[str, int]
    notes: list[str]


def rotate_block(
    plan: BlockPlan,
    block: nn.Module,
    states: ActivationStore,
    forward: Forward,
    part: WindowShard,
    recipe: Recipe,
) -> RotationResult:
    """Scale and rotate within a block, as the recipe says.

    Args:
        states: a stream in front of the block.

    Raises:
        UnsupportedModelError: the block lacks a part that the recipe names, or is another after it.
    """
    if not (recipe.rotation.value_output or recipe.rotation.online or recipe.rotation.equalize):
        return RotationResult({}, {}, {}, [])
    return _Inside(plan, block, states, forward, part, recipe).result()


class _Inside:
    """The work on one block. Names of layers are those within the block."""

    def __init__(
        self,
        plan: BlockPlan,
        block: nn.Module,
        states: ActivationStore,
        forward: Forward,
        part: WindowShard,
        recipe: Recipe,
    ) -> None:
        self._plan, self._block, self._recipe, self._options = plan, block, recipe, recipe.rotation
        self._forward, self._roles = forward, block_roles(block)
        self._first = distributed.broadcast(0, {"states": states[0][:1]})[
            "states"
        ]  # what one rank finds all find
        self._notes: list[str] = []
        self._evens_scores = (
            self._options.equalize and recipe.attention.key.spiking and plan.heads is not None
        )
        sites = [self._roles[role] for role in ("output", "down") if role in self._roles]
        wanted = recipe.calibration.saliency_tokens
        samples = SampledInputs(
            {name: block.get_submodule(name) for name in sites},
            part.whole,
            wanted,
            before=part.before,
        )
        self._heads = {
            name: TokenSample(part.whole, wanted, part.before) for name in ("query", "key")
        }
        with samples.hooks(), self._watching_heads():
            for batch in range(len(states)):
                forward(block, states[batch])
        samples.all_gather()
        self._inputs = {name: samples[name].double() for name in sites}

    @contextmanager
    def _watching_heads(self) -> Iterator[None]:
        def observe(module: nn.Module, seen: Observation) -> None:
            for name, sample in self._heads.items():
                sample.update(getattr(seen, name).transpose(1, 2).flatten(2))

        if not self._evens_scores:
            yield
            return
        with observing(observe):
            yield
        for sample in self._heads.values():
            sample.all_gather()

    def result(self) -> RotationResult:
        """Everything that the recipe asks for."""
        changed: set[str] = set()
        if self._evens_scores:
            changed |= self._even_query_key()
        fusion = Fusion(self._block)
        if self._options.equalize and "down" in self._options.online:
            self._even_down(fusion)
        if self._options.value_output or (
            self._options.equalize and "output" in self._options.online
        ):
            self._value_output(fusion)
        rotations = self._online(fusion)
        before = copy.deepcopy(self._block)
        for rotation, signs in rotations.values():
            rotation.set_signs(signs)
        error = difference(before, fusion, self._first, self._forward, around=self._block)
        if error > TOLERANCE:
            raise UnsupportedModelError(
                f"{type(self._block).__name__} with rotations inside does not give what it gave"
                f" (relative difference {error:.2g}); leave value_output, online and equalize out"
                " of the recipe"
            )
        fusion.put()
        return RotationResult(
            {
                rotation_of(f"{self._plan.name}.{name}"): rotation
                for name, (rotation, _) in rotations.items()
            },
            self._dense(changed | fusion.weights.keys()),
            {
                layer_name(f"{self._plan.name}.{name}"): int((signs > 0).sum())
                for name, (_, signs) in rotations.items()
            },
            self._notes,
        )

    def _dense(self, changed: set[str]) -> dict[str, Tensor]:
        stays = [
            name
            for name in sorted(changed)
            if f"{self._plan.name}.{name}" not in self._plan.linears
        ]
        found = {name: dict(self._block.get_submodule(name).named_parameters()) for name in stays}
        return {
            f"{self._plan.name}.{name}.{part}": value.detach()
            for name, parts in found.items()
            for part, value in parts.items()
        }

    def _online(self, fusion: Fusion) -> dict[str, tuple[Rotation, Tensor]]:
        """Rotations that run with the model, and their signs."""
        found = {}
        for role in self._options.online:
            name = self._roles[role]
            full = f"{self._plan.name}.{name}"
            if full not in self._plan.linears:
                continue
            signs = choose_signs(
                full,
                self._inputs[name],
                fusion.weight(name),
                self._plan.linears[full],
                self._options.choose,
                self._recipe.seed,
            )
            rotation = self._block.get_submodule(rotation_of(name))
            assert isinstance(rotation, Rotation)
            found[name] = rotation, signs
            fusion.columns(name, Rotation.of(signs))
        return found

    def _even_query_key(self) -> set[str]:
        """Scale the channels of Q and K against each other, the two that rotary embedding mixes
        alike; returns the layers that changed.
        """
        shape, roles = self._plan.heads, self._roles
        assert shape is not None
        why = "this block has no query and key layers of its own"
        if {"query", "key"} <= roles.keys():
            fusion, half = Fusion(self._block), shape.key_channels // 2
            rows, own = fusion.weight(roles["query"]).shape[0], fusion.weight(roles["key"]).shape[0]
            query, key = (self._heads[name].tokens().double() for name in ("query", "key"))
            if (
                own == shape.heads * shape.key_channels
                and rows % own == 0
                and 2 * half == shape.key_channels
                and query.shape[1] == rows
            ):
                shared = rows // own
                spread_of = key - key.mean(0) if self._recipe.attention.center else key
                power = spread_of.square().mean(0).view(shape.heads, 2, half).sum(1)
                energy = query.square().mean(0).view(shape.heads, shared, 2, half).sum((1, 2))
                scale = even_scale(power.flatten(), energy.flatten()).view(shape.heads, 1, 1, half)
                of_key, of_query = (
                    scale.expand(-1, count, 2, -1).flatten() for count in (1, shared)
                )
                fusion.rows(roles["key"], lambda x: x / of_key)
                fusion.rows(roles["query"], lambda x: x * of_query)
                if (
                    difference(
                        self._block, fusion, self._first, self._forward, at=roles.get("output")
                    )
                    <= TOLERANCE
                ):
                    fusion.put()
                    return set(fusion.weights)
            why = (
                "what stands between this block's query and key layers and their products lets no"
                " scale through"
            )
        self._notes.append(f"rotation.equalize: {why}, so Q and K stay as they are")
        return set()

    def _even_down(self, fusion: Fusion) -> None:
        if not {"gate", "up", "down"} <= self._roles.keys():
            self._notes.append(
                "rotation.equalize: what stands between this block's feed-forward layers lets no"
                " scale through, so they stay as they are"
            )
            return
        down = self._roles["down"]
        scale = even_scale(self._inputs[down].square().mean(0), fusion.weight(down).square().sum(0))
        fusion.rows(self._roles["up"], lambda x: x / scale)
        fusion.columns(down, lambda x: x * scale)
        self._inputs[down] = self._inputs[down] / scale

    def _value_output(self, fusion: Fusion) -> None:
        kind = type(self._block).__name__
        if not {"value", "output"} <= self._roles.keys():
            if not self._options.value_output:
                self._notes.append(
                    "rotation.equalize: this block has no value layer of its own, so what the"
                    " output layer reads stays as it is"
                )
                return
            raise UnsupportedModelError(
                f"{kind} has no value layer of its own, so nothing can be fused between value and"
                " output; set rotation.value_output to false"
            )
        value, output = self._roles["value"], self._roles["output"]
        head = int(getattr(self._block.get_submodule(value.rpartition(".")[0]), "head_dim", 0))
        rows, columns = fusion.weight(value).shape[0], fusion.weight(output).shape[1]
        if head < 1 or rows % head or columns % rows:
            raise UnsupportedModelError(
                f"{kind} does not say how many channels a head of V has; set rotation.value_output"
                " and equalize to false"
            )
        shared = columns // rows

        def of_value(x: Tensor) -> Tensor:  # summed over the query heads that share a value head
            return torch.flatten(x.unflatten(-1, (-1, shared, head)).sum(-2), -2)

        if self._options.equalize:
            scale = even_scale(
                of_value(self._inputs[output].square().mean(0)),
                of_value(fusion.weight(output).square().sum(0)),
            )
            wide = scale.view(-1, 1, head).expand(-1, shared, head).flatten()
            fusion.rows(value, lambda x: x / scale)
            fusion.columns(output, lambda x: x * wide)
            self._inputs[output] = self._inputs[output] / wide
        if self._options.value_output:
            signs = random_signs(head, self._recipe.seed + 1)
            rotate = by_head(lambda x: spread(x * signs.to(x)), head)
            fusion.rows(value, rotate)
            fusion.columns(output, rotate)
            self._inputs[output] = rotate(self._inputs[output])
