"""Rotating a model while it is converted: its ends first, each block when its turn comes, so that
no more than one block is rotated at a time.

Every fusion is checked on the calibration text, in float32, against the block as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.core.errors import UnsupportedModelError
from spikellm.data.shards import WindowShard
from spikellm.models.families import Blocks, block_roles, is_linear
from spikellm.models.plan import BlockPlan, output_head
from spikellm.models.swap import replace_module
from spikellm.observers.activation_store import ActivationStore
from spikellm.quantization.hadamard import random_signs, turn
from spikellm.recipe import Recipe
from spikellm.transforms.block_rotation import RotationResult, rotate_block
from spikellm.transforms.fusion import (
    TOLERANCE,
    Forward,
    Fusion,
    difference,
    readers_of_norms,
    rotate_stream,
)

_COARSE = 5e-2  # tolerance of the ends where the model's own type is a short one
_TOKENS = 16  # on which the ends are compared
_ROWS = 4096  # of an embedding at a time


class ModelRotation:
    """The rotations of one conversion.

    Args:
        model, blocks: in full precision, wrapped by :func:`wrap_online`.
    """

    def __init__(self, model: Any, blocks: Blocks, recipe: Recipe) -> None:
        self._model, self._blocks, self._recipe, self._options = (
            model,
            blocks,
            recipe,
            recipe.rotation,
        )
        self._width: int = model.get_input_embeddings().weight.shape[1]
        self._signs = random_signs(self._width, recipe.seed)
        self._done: set[int] = set()
        self._inside: dict[str, RotationResult] = {}
        self._rotated_ends = False

    def turn(self, x: Tensor) -> Tensor:
        """States of the residual stream, rotated."""
        return turn(x, self._signs)

    def ends(self, window: Tensor) -> None:
        """Rotate embeddings, last norm and output projection; once.

        Embeddings that are shared with the projection are parted from it.

        Args:
            window: some tokens, ``(1, tokens)``.

        Raises:
            UnsupportedModelError: the family's ends are not embeddings, a norm and a projection.
        """
        if not self._options.residual or self._rotated_ends:
            return
        self._rotated_ends = True
        model, kind = self._model, type(self._model).__name__
        tokens = window[:, :_TOKENS].to(next(model.parameters()).device)
        head = output_head(model)
        inside = f"{self._blocks.name}."
        with _without(self._blocks):
            expected = model(tokens, use_cache=False).logits.float()
            seen = readers_of_norms(model, lambda: model(tokens, use_cache=False), self._width)
        norms = {
            norm: names
            for norm, names in seen.items()
            if not norm.startswith(inside) and head in names
        }
        if head is None or list(norms.values()) != [(head,)]:
            raise UnsupportedModelError(
                f"the output projection of {kind} does not read a norm of the residual stream, so"
                " the stream cannot be rotated; set rotation.residual to false"
            )
        [norm] = norms
        for name, module in model.named_modules():
            if (
                isinstance(module, nn.Embedding)
                and module.embedding_dim == self._width
                and not name.startswith(inside)
            ):
                rows = [
                    self.turn(part.double()).to(part.dtype)
                    for part in module.weight.detach().split(_ROWS)
                ]
                module.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        model.config.tie_word_embeddings = False
        before = {
            name: parameter.detach().clone()
            for name, parameter in model.get_submodule(norm).named_parameters()
        }
        tolerance, errors = (
            (TOLERANCE if model.dtype in (torch.float32, torch.float64) else _COARSE),
            list[float](),
        )
        old = model.get_submodule(head)
        for offset in (0.0, 1.0):
            fusion = Fusion(model)
            rotate_stream(fusion, norms, (), self.turn, offset)
            fusion.put()
            with _without(self._blocks):
                found = model(tokens, use_cache=False).logits.float()
            errors.append(float((found - expected).norm() / expected.norm()))
            if errors[-1] <= tolerance:
                return
            replace_module(model, head, old)
            for name, value in before.items():
                model.get_submodule(norm).get_parameter(name).data.copy_(value)
        raise UnsupportedModelError(
            f"with a rotated residual stream the ends of {kind} do not give what they gave"
            f" (relative difference {min(errors):.2g}); set rotation.residual to false"
        )

    @property
    def active(self) -> bool:
        """Whether the recipe rotates anything."""
        return self._options.active

    def inside(
        self,
        plan: BlockPlan,
        block: nn.Module,
        states: ActivationStore,
        forward: Forward,
        part: WindowShard,
    ) -> RotationResult:
        """See :func:`spikellm.transforms.block_rotation.rotate_block`.

        Once, what was done then is told again.
        """
        if plan.name not in self._inside:
            self._inside[plan.name] = rotate_block(plan, block, states, forward, part, self._recipe)
        return self._inside[plan.name]

    def stream(self, index: int, block: nn.Module, hidden: Tensor, forward: Forward) -> None:
        """Let a block work on the rotated stream; once.

        Args:
            hidden: what the block is fed, in the rotated stream.

        Raises:
            UnsupportedModelError: the block does something with the stream that a rotation does not
                pass through.
        """
        if not self._options.residual or index in self._done:
            return
        self._done.add(index)
        seen = readers_of_norms(block, lambda: forward(block, hidden), self._width)
        norms = {norm: names for norm, names in seen.items() if names}
        readers = {name for names in norms.values() for name in names}
        roles = block_roles(block)
        writers = tuple(roles[role] for role in ("output", "down") if role in roles)
        others = [
            name
            for name, module in block.named_modules()
            if is_linear(module) and name not in readers and name not in writers
        ]
        kind = type(block).__name__
        if others or not readers or not writers:
            raise UnsupportedModelError(
                f"{kind}: what {others[0] if others else 'its layers'} reads or writes of the"
                " residual stream is not known, so the stream cannot be rotated; set"
                " rotation.residual to false"
            )
        errors = []
        for offset in (0.0, 1.0):
            fusion = Fusion(block)
            rotate_stream(fusion, norms, writers, self.turn, offset)
            errors.append(difference(block, fusion, hidden, forward, self.turn))
            if errors[-1] <= TOLERANCE:
                fusion.put()
                return
        raise UnsupportedModelError(
            f"{kind} on a rotated residual stream does not give what it gave (relative difference"
            f" {min(errors):.2g}): it does more with the stream than read it through a norm and add"
            " to it; set rotation.residual to false"
        )


@contextmanager
def _without(blocks: Blocks) -> Iterator[None]:
    """While this holds, blocks pass on what they are fed."""
    seen: list[Any] = []

    def passing(real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            if not seen:
                seen.append(
                    real(*arguments, **keywords)
                )  # what a block of this family returns beside its states
            return (hidden, *seen[0][1:]) if isinstance(seen[0], (tuple, list)) else hidden

        return forward

    own = [
        block.__dict__.get("forward") for block in blocks.modules
    ]  # set on the module itself, by hooks for example
    for block in blocks.modules:
        block.forward = passing(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks.modules, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
