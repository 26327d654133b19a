"""One block while transforms prepare it, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core import distributed
from spikellm.core.errors import UnsupportedModelError
from spikellm.data.shards import WindowShard
from spikellm.models.attention_interface import watching_heads
from spikellm.models.families import INPUT_SITES, block_roles
from spikellm.models.plan import BlockPlan
from spikellm.nn.rotation import Rotation, rotation_of
from spikellm.observers.activation_store import ActivationStore
from spikellm.observers.input_stats import SampledInputs, TokenSample
from spikellm.observers.token_weights import SamplePlan, TokenWeights
from spikellm.recipe import Recipe
from spikellm.transforms.fusion import TOLERANCE, Forward, Fusion, Probe, difference

_HEADS = {"query-heads": 0, "key-heads": 1, "value-heads": 2}  # of Q, K and V


class OnlineSetting(NamedTuple):
    """A rotation that runs with the model, and what it is to become; see
    :meth:`spikellm.nn.rotation.Rotation.set_signs`.
    """

    rotation: Rotation
    signs: Tensor
    offset: Tensor | None

    def apply(self) -> None:
        """Let it rotate."""
        self.rotation.set_signs(self.signs, self.offset)

    def undo(self) -> None:
        """Let it do nothing."""
        self.rotation.set_signs(torch.zeros_like(self.signs))


class TransformedBlock(NamedTuple):
    """What transforms changed of a block beyond the weights of layers that are to be converted.

    Attributes:
        modules: modules that run with the model, by full name.
        dense: parameters of layers that stay as they are, by full name.
        rotated: how many input channels are rotated while the model runs, by layer.
        notes: what a user should know.
    """

    modules: dict[str, nn.Module]
    dense: dict[str, Tensor]
    rotated: dict[str, int]
    notes: list[str]


class BlockState:
    """One block, what is seen of it, and what transforms have made of it so far.

    Names of layers are those within the block.

    Args:
        plan, module: the block, in full precision.
        states: a stream in front of it.
        forward: runs the block, or another in its place, on some windows.
        shard: calibration tokens of this rank.
        recipe: the whole recipe.

    Attributes:
        roles: names of the layers by what they do (``query``, ``down``, …), where known.
        inputs: samples, float64 ``(tokens, channels)``: by role of what an ``output`` or ``down``
            layer is fed; under ``query-heads``, ``key-heads`` and ``value-heads`` Q, K and V as
            attention multiplies them. Transforms change them along with the weights.
        fusion: new weights, into which transforms are fused one after the other.
        online: rotations that run with the model, by layer, and what they are to become.
        notes: what a user should know.
    """

    def __init__(
        self,
        plan: BlockPlan,
        module: nn.Module,
        states: ActivationStore,
        forward: Callable[[nn.Module, Tensor], Tensor],
        shard: WindowShard,
        recipe: Recipe,
    ) -> None:
        self.plan, self.module, self.recipe = plan, module, recipe
        self.forward: Forward = forward
        self._states, self._shard = states, shard
        self.roles = block_roles(module)
        self.inputs: dict[str, Tensor] = {}
        self.fusion = Fusion(module)
        self.online: dict[str, OnlineSetting] = {}
        self.notes: list[str] = []
        self._changed: set[str] = set()
        self._vectors: set[str] = set()

    @cached_property
    def hidden(self) -> Tensor:
        """One window of the stream, ``(1, tokens, channels)``, the same on every rank: what one
        rank finds all find.
        """
        return distributed.broadcast(0, {"states": self._states[0][:1]})["states"]

    def full_name(self, name: str) -> str:
        """Name within the model of a layer of the block."""
        return f"{self.plan.name}.{name}"

    def observe(self, wanted: Collection[str]) -> None:
        """Run the block on the stream and sample these ``inputs``; once, before anything changes.

        Roles that the block lacks are left out, and heads where attention is not reached.
        """
        if not wanted:
            return
        shard, calibration = self._shard, self.recipe.calibration
        weights = TokenWeights.of(calibration, shard)
        plan = SamplePlan(shard.whole, calibration.saliency_tokens, shard.before, weights)
        layers = {role: self.roles[role] for role in wanted if role in self.roles}
        samples = SampledInputs(
            {name: self.module.get_submodule(name) for name in layers.values()}, plan
        )
        reached = _HEADS if self.plan.heads is not None else ()
        heads = {site: TokenSample(plan) for site in reached if site in wanted}
        with samples.hooks(), _sampling(heads):
            for batch in range(len(self._states)):
                self.forward(self.module, self._states[batch])
        samples.all_gather()
        for sample in heads.values():
            sample.all_gather()
        self.inputs = {role: samples[name].double() for role, name in layers.items()}
        self.inputs |= {site: sample.tokens().double() for site, sample in heads.items()}

    def coded(self, role: str) -> Tensor:
        """What is coded of an input, float64 ``(tokens, channels)``: its mean is taken away where a
        transform of the recipe does so.
        """
        x = self.inputs[role]
        sites = {site for options in self.recipe.transforms for site in options.centers}
        return x - x.mean(0) if any(role in INPUT_SITES[site] for site in sites) else x

    def power(self, role: str) -> Tensor:
        """Mean square of every channel of :meth:`coded`, ``(channels,)``."""
        return self.coded(role).square().mean(0)

    def put_if_equal(self, fusion: Fusion, at: str | None = None) -> bool:
        """Put new weights into the block at once, if it gives what it gave.

        Args:
            at: compare what this layer is fed, instead of what the block adds to the stream.
        """
        if difference(self.module, fusion, Probe(self.hidden, self.forward), at=at) > TOLERANCE:
            return False
        fusion.put()
        self._changed |= fusion.weights.keys()
        self._vectors |= fusion.vectors.keys()
        return True

    def finish(self, names: Collection[str]) -> bool:
        """Put all that was fused into the block, after a check in full precision; whether it holds.

        Args:
            names: of the transforms, for the error.

        Raises:
            UnsupportedModelError: the block does not give what it gave, and the recipe does not
                adapt.
        """
        if not self.fusion.weights and not self.online:
            return True
        before = copy.deepcopy(self.module)
        for setting in self.online.values():
            setting.apply()
        probe = Probe(self.hidden, self.forward)
        error = difference(before, self.fusion, probe, around=self.module)
        if error > TOLERANCE and self.recipe.adapt:
            for setting in self.online.values():
                setting.undo()
            self.notes.append(
                f"{', '.join(names)}: transformed, the block does not give what it gave (relative"
                f" difference {error:.2g}), so it is coded without them"
            )
            return False
        if error > TOLERANCE:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} does not give what it gave once its layers are"
                f" transformed (relative difference {error:.2g}); leave {', '.join(names)} out of"
                " the recipe"
            )
        self.fusion.put()
        self._changed |= self.fusion.weights.keys()
        return True

    def result(self, rotated: dict[str, int]) -> TransformedBlock:
        """What has changed; ``rotated`` as transforms recorded it."""
        modules: dict[str, nn.Module] = {
            rotation_of(self.full_name(name)): setting.rotation
            for name, setting in self.online.items()
        }
        return TransformedBlock(modules, self._dense(), rotated, self.notes)

    def _dense(self) -> dict[str, Tensor]:
        """Parameters of changed layers that are not converted, and changed vectors of norms."""
        found = {
            self.full_name(name): self.module.get_parameter(name).detach()
            for name in sorted(self._vectors)
        }
        for name in sorted(self._changed):
            if self.full_name(name) not in self.plan.linears:
                for part, value in self.module.get_submodule(name).named_parameters():
                    found[self.full_name(f"{name}.{part}")] = value.detach()
        return found


@contextmanager
def _sampling(heads: dict[str, TokenSample]) -> Iterator[None]:
    """While this holds, Q, K and V are sampled as attention multiplies them."""

    def watch(module: nn.Module, *parts: Tensor) -> None:
        for site, sample in heads.items():
            sample.update(parts[_HEADS[site]].transpose(1, 2).flatten(2))

    if not heads:
        yield
        return
    with watching_heads(watch):
        yield
