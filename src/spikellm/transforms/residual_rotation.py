"""A rotated residual stream (QuaRot, SpinQuant): what lies around the blocks first
(:mod:`spikellm.transforms.stream_ends`), each block when its turn comes, so that no more than one
block is rotated at a time.

Every fusion is checked on calibration text, in float32, against the block as it was. It costs
nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.core import distributed
from spikellm.core.errors import UnsupportedModelError
from spikellm.models.families import Blocks, block_roles, is_linear
from spikellm.nn.hooks import first_output
from spikellm.quantization.hadamard import random_signs, turn
from spikellm.transforms.base import ModelState, Transform, transforms
from spikellm.transforms.block_state import BlockState
from spikellm.transforms.fusion import (
    OFFSETS,
    TOLERANCE,
    Fusion,
    Probe,
    Turn,
    difference,
    readers_of_norms,
    rotate_stream,
)
from spikellm.transforms.options import ResidualRotationOptions
from spikellm.transforms.stream_basis import Passed, learn_basis, mean_loss, sites_of
from spikellm.transforms.stream_ends import LEAVE_OUT, rotate_embeddings_and_head


@transforms.register("residual-rotation")
class ResidualRotation(Transform[ResidualRotationOptions]):
    """Fused into everything that reads or writes the residual stream."""

    Options = ResidualRotationOptions
    changes_stream = True
    unties_embeddings = True

    def __init__(self, options: ResidualRotationOptions) -> None:
        super().__init__(options)
        self._signs = torch.ones(0)
        self._basis: Tensor | None = None

    def rotate(self, x: Tensor) -> Tensor:
        """States of the residual stream, rotated."""
        return turn(x, self._signs) if self._basis is None else x @ self._basis.to(x)

    def back(self, x: Tensor) -> Tensor:
        """Rotated states as they were."""
        return turn(x, self._signs) if self._basis is None else x @ self._basis.T.to(x)

    def in_words(self) -> str:
        learned = " into a learned basis" if self.options.basis == "learned" else ""
        return f"the residual stream rotated{learned} (fused)"

    def require_supported(self, model: Any, blocks: Blocks) -> None:
        require_bare_writers(model, blocks)

    def prepare_model(self, state: ModelState) -> None:
        width = state.model.get_input_embeddings().weight.shape[1]
        self._signs = random_signs(width, state.recipe.seed)
        if self.options.basis == "learned":
            self._basis = self._learned(state, width)
        rotate_embeddings_and_head(state, self.rotate)

    def _learned(self, state: ModelState, width: int) -> Tensor:
        """The learned basis, the same on every rank; started from none, or from a random one where
        that is better.
        """
        centers = {site for options in state.recipe.transforms for site in options.centers}
        passed = (Passed(*one) for one in state.walk())
        sites = sites_of(
            passed, width, len(state.blocks.modules), centered="attention-input" in centers
        )
        if not sites:
            raise UnsupportedModelError(
                f"no layer of {type(state.blocks.modules[0]).__name__} reads a norm of the residual"
                f" stream, so no basis of it can be learned; {LEAVE_OUT}"
            )
        identity = torch.eye(width, dtype=torch.float64, device=sites[0].moments.device)
        starts = [identity, self.rotate(identity)]
        start = min(starts, key=lambda one: float(mean_loss(sites, one.float())))
        learned = learn_basis(sites, start)
        return distributed.broadcast(0, {"basis": learned})["basis"]

    def prepare_block(self, state: BlockState) -> None:
        rotate_residual(state, self.rotate, self.back)


def rotate_residual(state: BlockState, rotate: Turn, back: Turn) -> None:
    """Let a block work on the rotated stream; ``back`` is the inverse of ``rotate``.

    Raises:
        UnsupportedModelError: the block does something with the stream that a rotation does not
            pass through.
    """
    block, kind = state.module, type(state.module).__name__
    norms, writers = _stream_layers(state, state.hidden.shape[-1])
    errors = []
    for offset in OFFSETS:
        fusion = Fusion(block)
        rotate_stream(fusion, norms, writers, rotate, offset)
        errors.append(difference(block, fusion, Probe(state.hidden, state.forward, back)))
        if errors[-1] <= TOLERANCE:
            fusion.put()
            return
    raise UnsupportedModelError(
        f"{kind} on a rotated residual stream does not give what it gave (relative difference"
        f" {min(errors):.2g}): it does more with the stream than read it through a norm and add"
        f" to it; {LEAVE_OUT}"
    )


def _stream_layers(
    state: BlockState, width: int
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Norms of the stream with the layers that read each, and the layers that write to it."""
    block, roles = state.module, block_roles(state.module)
    seen = readers_of_norms(block, lambda: state.forward(block, state.hidden), width)
    norms = {norm: names for norm, names in seen.items() if names}
    readers = {name for names in norms.values() for name in names}
    writers = tuple(roles[role] for role in ("output", "down") if role in roles)
    others = [
        name
        for name, module in block.named_modules()
        if is_linear(module) and name not in readers and name not in writers
    ]
    if others or not readers or not writers:
        raise UnsupportedModelError(
            f"{type(block).__name__}: what {others[0] if others else 'its layers'} reads or writes"
            " of the residual stream is not known, so the stream cannot be rotated;"
            f" {LEAVE_OUT}"
        )
    return norms, writers


@torch.no_grad()
def require_bare_writers(model: Any, blocks: Blocks) -> None:
    """Refuse blocks that put a norm behind what they write to the stream: its gain is not the same
    for all channels, so no rotation passes through.

    Raises:
        UnsupportedModelError: names the norm.
    """
    block, written, behind = blocks.modules[0], list[Tensor](), list[str]()
    roles = block_roles(block)

    def reads(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            fed = arguments[0] if arguments and isinstance(arguments[0], Tensor) else None
            if fed is not None and any(fed.data_ptr() == one.data_ptr() for one in written):
                behind.append(name)

        return hook

    handles = [
        block.get_submodule(roles[role]).register_forward_hook(lambda *a: written.append(a[2]))
        for role in ("output", "down")
        if role in roles
    ]
    for name, module in block.named_modules():
        if type(module).__name__.endswith("Norm"):
            handles.append(module.register_forward_pre_hook(reads(name)))
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    try:
        first_output(block, lambda: model(tokens, use_cache=False))
    finally:
        for handle in handles:
            handle.remove()
    if behind:
        raise UnsupportedModelError(
            f"{type(block).__name__} puts a norm ({behind[0]}) behind what it writes to the"
            f" residual stream, so the stream cannot be rotated; {LEAVE_OUT}"
        )
