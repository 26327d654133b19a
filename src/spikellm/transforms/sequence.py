"""All transforms of one conversion, applied in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spikellm.models.families import Blocks
from spikellm.recipe import Recipe
from spikellm.transforms.base import ModelState, Transform
from spikellm.transforms.block_state import BlockState, TransformedBlock


class TransformSequence:
    """The transforms of one conversion; each thing is prepared once.

    A look at the whole model prepares everything before any block is converted; what was done then
    is not done again.

    Args:
        parts: in the order in which they are applied.
    """

    def __init__(self, parts: Iterable[Transform[Any]]) -> None:
        self._parts = list(parts)
        self._model_is_done = False
        self._streams_done: set[str] = set()
        self._blocks_done: dict[str, TransformedBlock] = {}

    @property
    def active(self) -> bool:
        """Whether there is any."""
        return bool(self._parts)

    @property
    def unties_embeddings(self) -> bool:
        """Whether the output projection has a weight of its own afterwards."""
        return any(part.unties_embeddings for part in self._parts)

    def batch_sizes(self) -> set[int]:
        """Numbers of windows that blocks are run on at a time, beside whole batches."""
        return {1} if self.active else set()

    def stream_key(self, recipe: Recipe, *, surveyed: bool) -> str:
        """What of a recipe the bits of the full-precision stream depend on.

        After a look at the whole model that is all of it, since blocks are prepared before they are
        run.
        """
        if surveyed and self.active:
            return recipe.model_dump_json(exclude={"name", "description"})
        changing = [part.options.model_dump_json() for part in self._parts if part.changes_stream]
        centers = sorted({site for part in self._parts for site in part.options.centers})
        return f"{' '.join(changing)} {centers} {recipe.seed}" if changing else ""

    def require_supported(self, model: Any, blocks: Blocks) -> None:
        """See :meth:`Transform.require_supported`."""
        for part in self._parts:
            part.require_supported(model, blocks)

    def insert(self, state: ModelState) -> None:
        """See :meth:`Transform.insert`."""
        for part in self._parts:
            part.insert(state)

    def prepare_model(self, state: ModelState) -> None:
        """See :meth:`Transform.prepare_model`."""
        if not self._model_is_done:
            self._model_is_done = True
            for part in self._parts:
                part.prepare_model(state)

    def prepare_stream(self, state: BlockState) -> None:
        """Let a block work on the residual stream as it is now, before anything runs through it."""
        if state.plan.name not in self._streams_done:
            self._streams_done.add(state.plan.name)
            for part in self._parts:
                if part.changes_stream:
                    part.prepare_block(state)

    def prepare_block(self, state: BlockState) -> TransformedBlock:
        """Everything else that is to be done to a block, and what has changed in it."""
        name = state.plan.name
        if name not in self._blocks_done:
            parts = [part for part in self._parts if not part.changes_stream]
            state.observe({site for part in parts for site in part.observes(state)})
            for part in parts:
                part.prepare_block(state)
            holds = state.finish([part.options.name for part in parts])
            rotated: dict[str, int] = {}
            for part in parts if holds else ():
                rotated |= part.record(name)
            self._blocks_done[name] = state.result(rotated)
        return self._blocks_done[name]
