"""The native step of one model: its program, its tables, and passes of it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from spikellm.kernels.native.step_run import StepInput, entries, run_step
from spikellm.kernels.native.step_structs import Cached
from spikellm.models.decoder_capture import Captured, position_embeddings
from spikellm.models.families import decoder_of
from spikellm.runtime.decoder_step.blocks import Built

_POSITIONS = 128  # rows at least that a table grows by


@dataclass
class DecoderStep:
    """What a model's decoder step consists of.

    Attributes:
        embed: input of the first block, ``(batch, tokens, columns)``, of tokens and positions.
        finish: logits of what the output projection gives.
        kind: class of the model's output.
        tables: cosine and sine of each table, float32 ``(positions, channels)``.
    """

    model: Any
    built: Built
    embed: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    kind: type
    tables: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def given(
        self,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cached: Any,
        apart: int = 0,
    ) -> StepInput:
        """A pass from its input, ``(batch, tokens, columns)``."""
        if self.built.tables:
            self._reach(int(positions.max()) + 1)
        return StepInput(hidden.float().contiguous(), positions, self.tables, mask, cached, apart)

    def _reach(self, positions: int) -> None:
        """Let tables have rows for so many positions."""
        held = len(self.tables[0][0]) if self.tables else 0
        if positions <= held:
            return
        wanted = torch.arange(held, max(positions, held + max(_POSITIONS, held // 2)))
        found = position_embeddings(self.model, wanted.unsqueeze(0))
        grown = []
        for number, block in enumerate(self.built.tables):
            pair = found[block]
            assert pair is not None
            cos, sin = (part[0].float().contiguous() for part in pair)
            if held:
                old = self.tables[number]
                cos, sin = torch.cat([old[0], cos]), torch.cat([old[1], sin])
            grown.append((cos, sin))
        self.tables = grown

    def run(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Logits of new tokens, ``(batch, tokens, vocabulary)``; they are cached."""
        cached = entries_of(cache, tokens.shape[1])
        given = self.given(self.embed(tokens, positions), positions, mask, cached)
        found, _ = run_step(self.built.program, given, commit=True)
        return self.finish(found)

    def run_each(self, tokens: Tensor, positions: Tensor, caches: Sequence[Any]) -> Tensor:
        """Logits of new tokens of sequences that have a cache each, ``(sequences, tokens,
        vocabulary)``; they are cached.
        """
        own = [entries_of(cache, tokens.shape[1]) for cache in caches]
        layers = len(own[0])
        together = (ctypes.c_void_p * (layers * len(own)))(*chain.from_iterable(own))
        given = self.given(self.embed(tokens, positions), positions, None, together, layers)
        found, _ = run_step(self.built.program, given, commit=True)
        return self.finish(found)


def entries_of(cache: Any, new: int) -> Any:
    """Caches of all layers with room for new tokens, as an array of pointers.

    It is kept at the cache for the tokens that there is room for, as long as nobody but native
    steps touches the layers.
    """
    known: _Entries | None = getattr(cache, _ENTRIES, None)
    now = [getattr(layer, "_entry", None) for layer in cache.layers]
    if known is not None and known.left >= new and now == known.entries:
        setattr(cache, _ENTRIES, known._replace(left=known.left - new))
        return known.array
    found = [layer.entry(new) for layer in cache.layers]
    left = min(one.room - one.first - one.past for one in found) - new
    array = entries(found)
    setattr(cache, _ENTRIES, _Entries(array, found, left))
    return array


class _Entries(NamedTuple):
    """Entries of a cache's layers, also as an array of pointers, and how many tokens fit in."""

    array: Any
    entries: list[Cached]
    left: int

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


_ENTRIES = "_spikellm_entries"


def embedding_of(
    model: Any, tokens: Tensor, positions: Tensor, wanted: Tensor
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """How the input of the first block comes from tokens and positions; None if in no known way.

    Args:
        tokens, positions: ``(batch, tokens)`` of a pass.
        wanted: the input of the first block in it.
    """
    table: Callable[[Tensor], Tensor] = model.get_input_embeddings()
    decoder = decoder_of(model)
    if torch.equal(table(tokens), wanted):
        return lambda tokens, _: table(tokens)
    for module in _other_tables(decoder, table):
        offset, weight = int(getattr(module, "offset", 0)), cast(Tensor, module.weight)

        def embed(tokens: Tensor, positions: Tensor) -> Tensor:
            return table(tokens) + weight[positions + offset]  # noqa: B023

        if torch.equal(embed(tokens, positions), wanted):
            return embed
    return None


def finish_of(model: Any, seen: Captured) -> Callable[[Tensor], Tensor] | None:
    """What a model makes of its output projection; None if it is nothing known."""
    projected, logits = seen.projected, seen.output.logits
    assert projected is not None
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def capped(x: Tensor) -> Tensor:
        return torch.tanh(x / cap) * cap  # type: ignore[operator]

    ways: list[Callable[[Tensor], Tensor]] = [_as_it_is, *([capped] if cap else [])]
    found = projected[:, -logits.shape[1] :]
    return next((way for way in ways if torch.equal(way(found), logits)), None)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _other_tables(decoder: nn.Module, table: object) -> Sequence[nn.Module]:
    return [
        module
        for module in decoder.children()
        if isinstance(module, nn.Embedding) and module is not table
    ]
