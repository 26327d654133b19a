"""Generations of one request, whose pieces come from the engine's thread to the server's loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spikellm.serving.answers import Usage
from spikellm.serving.engine import Engine
from spikellm.serving.generation import Asked, Finish, Generation, Piece
from spikellm.serving.sampling import TokenLogprob


class GenerationFailedError(Exception):
    """A generation ended with an error.

    Attributes:
        busy: see :class:`spikellm.serving.generation.Piece`.
    """

    def __init__(self, reason: str, *, busy: bool) -> None:
        super().__init__(reason)
        self.busy = busy


@dataclass
class Answer:
    """What one generation said."""

    text: str = ""
    logprobs: list[TokenLogprob | int] | None = None
    finish: Finish | None = None


class Choices:
    """Generations of one request, under way from here on.

    Raises:
        FullError, StoppedError: the engine takes no more.
    """

    def __init__(self, engine: Engine, tokenizer: Any, asked: Sequence[Asked]) -> None:
        engine.require_room(len(asked))
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._generations = [
            Generation(one, tokenizer, self._emitter(index)) for index, one in enumerate(asked)
        ]
        engine.submit(self._generations)

    def __len__(self) -> int:
        return len(self._generations)

    def _emitter(self, index: int) -> Callable[[Piece], None]:
        def emit(piece: Piece) -> None:
            try:
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, piece))
            except RuntimeError:  # the loop is closed: nobody listens
                self._generations[index].cancelled = True

        return emit

    def known(self, index: int) -> bool:
        """Whether logarithms of probabilities were asked for."""
        return self._generations[index].asked.logprobs is not None

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once."""
        prompts = {id(one.asked.prompt): len(one.asked.prompt) for one in self._generations}
        return Usage(sum(prompts.values()), sum(len(one.new) for one in self._generations))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all generations as they come, until the last one of each."""
        left = len(self._generations)
        while left:
            index, piece = await self._arrived.get()
            left -= piece.last
            yield index, piece

    async def collect(self) -> list[Answer]:
        """What all of them say.

        Raises:
            GenerationFailedError: one ended with an error.
        """
        found = [Answer(logprobs=[] if self.known(index) else None) for index in range(len(self))]
        async for index, piece in self.pieces():
            if piece.error is not None:
                raise GenerationFailedError(piece.error, busy=piece.busy)
            answer = found[index]
            answer.text += piece.text
            answer.finish = piece.finish
            if answer.logprobs is not None:
                answer.logprobs.extend(piece.logprobs)
        return found

    def give_up(self) -> None:
        """Nobody waits any more; what is done stays done."""
        open_ones = [one for one in self._generations if not one.finished]
        if open_ones:
            self._engine.cancel(open_ones)
