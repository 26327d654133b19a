"""Caches of layers in memory with room for tokens to come, so that a native step writes rows where
they stay. To the library they are its own layers: ``keys`` and ``values`` are what is held so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from spikellm.kernels.native.step_structs import Cached

_ROOM = 128  # tokens at least that there is room for
_SLACK = 64  # bytes behind the last row that kernels may read


class GrowingRows:
    """What of a library's layer changes: where ``keys`` and ``values`` are.

    A native step counts the tokens that it adds in the structure that it is given (:meth:`entry`);
    tensors are looked up in the room when somebody asks for them. Any assignment gives the room up.
    """

    _held: tuple[Tensor | None, Tensor | None] = (None, None)
    _total: int = 0
    _entry: Cached | None = None
    _room: tuple[Tensor, Tensor] | None = None
    _known: tuple[int, int] = (0, 0)  # first and past of the entry when ``_held`` was looked up

    def entry(self, new: int) -> Cached:
        """Where a native step finds and puts rows, with room for some new tokens."""
        entry = self._entry
        if entry is None or entry.first + entry.past + new > entry.room:
            entry = self._grow(new)
        return entry

    def _grow(self, new: int) -> Cached:
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        past, total = keys.shape[-2], self.get_seq_length()  # type: ignore[attr-defined]
        size = past + new + max(_ROOM, past // 4)
        room = _with_room(keys, size), _with_room(values, size)
        self._room, self._known = room, (0, past)
        self._held = room[0][:, :, :past], room[1][:, :, :past]
        self._entry = Cached(
            room[0].data_ptr(),
            room[1].data_ptr(),
            *(one.stride(1) * one.element_size() for one in room),
            size,
            0,
            past,
            total,
            max(0, getattr(self, "sliding_window", 0) - 1),
        )
        self._entry.memory = room  # whoever has the addresses keeps what they are of
        return self._entry

    def _look_up(self) -> tuple[Tensor | None, Tensor | None]:
        entry = self._entry
        if entry is not None and (now := (entry.first, entry.past)) != self._known:
            assert self._room is not None
            part = slice(now[0], sum(now))
            self._held = self._room[0][:, :, part], self._room[1][:, :, part]
            self._known = now
        return self._held

    def _give_up(self) -> tuple[Tensor | None, Tensor | None]:
        held = self._look_up()
        if self._entry is not None:
            self._total, self._entry, self._room = self._entry.total, None, None
        return held

    @property
    def keys(self) -> Tensor | None:
        """``(batch, heads, tokens, channels or bytes)``."""
        return self._look_up()[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._held = keys, self._give_up()[1]

    @property
    def values(self) -> Tensor | None:
        """``(batch, heads, tokens, channels or bytes)``."""
        return self._look_up()[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._held = self._give_up()[0], values

    @property
    def cumulative_length(self) -> int:
        """Tokens that ever came, of a layer with a sliding window."""
        return int(self._entry.total) if self._entry is not None else self._total

    @cumulative_length.setter
    def cumulative_length(self, tokens: int) -> None:
        self._give_up()
        self._total = tokens

    def __getstate__(self) -> dict[str, Any]:
        held, total = self._look_up(), self.cumulative_length
        own = {**self.__dict__, "_held": held, "_total": total}
        return {**own, "_entry": None, "_room": None}


class GrowingLayer(GrowingRows, DynamicLayer):  # type: ignore[misc]
    """Cache of one layer that sees all tokens, in the model's numbers."""


class GrowingSlidingLayer(GrowingRows, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Cache of one layer that sees a sliding window, in the model's numbers."""


def make_growing(cache: Cache) -> str | None:
    """Let every layer of a dynamic cache grow; why that cannot be, None once it is so."""
    if type(cache) is not DynamicCache or cache.offloading:
        return f"the cache is a {type(cache).__name__}"
    for index, layer in enumerate(cache.layers):
        if not layer.is_initialized or getattr(layer, "record_past", False):
            return "the cache is empty, or records what it drops"
        if isinstance(layer, GrowingRows):
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"a layer of the cache is a {type(layer).__name__}"
        made = GrowingLayer() if type(layer) is DynamicLayer else None
        made = made or GrowingSlidingLayer(sliding_window=layer.sliding_window)
        made.__dict__.update({k: v for k, v in vars(layer).items() if k not in _MOVED})
        made._held = layer.keys, layer.values
        made._total = getattr(layer, "cumulative_length", 0)
        cache.layers[index] = made
    return None


@contextmanager
def whole_or_not(cache: Any) -> Iterator[None]:
    """Within this context a pass adds its tokens to all layers of a cache or, where it is
    interrupted, to none.
    """
    if type(cache) is not DynamicCache:
        yield
        return
    names = ("keys", "values", "cumulative_length", "is_initialized")
    before = [
        (layer, {name: getattr(layer, name) for name in names if hasattr(layer, name)})
        for layer in cache.layers
    ]
    try:
        yield
    except BaseException:
        del cache.layers[len(before) :]
        for index, (layer, state) in enumerate(before):
            cache.layers[index] = layer
            for name, value in state.items():
                setattr(layer, name, value)
        raise


_MOVED = ("keys", "values", "cumulative_length")


def _with_room(rows: Tensor, size: int) -> Tensor:
    """Rows ``(batch, heads, tokens, width)`` with room for ``size`` tokens."""
    batch, heads, past, width = rows.shape
    slack = -(-_SLACK // rows.element_size())
    memory = torch.empty(batch * heads * size * width + slack, dtype=rows.dtype)
    room = memory[: batch * heads * size * width].view(batch, heads, size, width)
    room[:, :, :past] = rows
    return room
