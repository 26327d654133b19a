"""The engine: one thread that owns the model, takes prompts in and decodes all generations that
are under way together, a token each.

Generations come and go between steps. A long prompt goes through the model in pieces, with a step
of the others between two of them. What a generation says depends on nobody else: each has a cache
of its own (:func:`spikellm.runtime.decoder_step.several.decode_each`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from spikellm.core.errors import RequestError
from spikellm.runtime.decoder_step.several import decode_each
from spikellm.serving.generation import Generation

_log = logging.getLogger("spikellm")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine takes on.

    Attributes:
        parallel: generations that are decoded together.
        queue: generations that wait beside them.
        seconds: of a generation, from its arrival; it ends with what it has.
        chunk: tokens of a prompt that go through the model at a time.
    """

    parallel: int = 16
    queue: int = 256
    seconds: float = 600.0
    chunk: int = 256

    @property
    def most(self) -> int:
        """Generations under way and waiting."""
        return self.parallel + self.queue


class Watcher(Protocol):
    """Is told what the engine does, from its thread."""

    def prompt(self, tokens: int) -> None:
        """Tokens of a prompt went through the model."""

    def step(self, generations: int) -> None:
        """So many generations have a token more."""

    def ended(self, generation: Generation) -> None:
        """A generation is over."""

    def idle(self, model: Any) -> None:
        """Nothing is to be done."""


class FullError(Exception):
    """As many generations wait as may."""


class StoppedError(Exception):
    """The engine takes nothing any more."""


class Engine:
    """Runs generations of a model.

    Args:
        model: in evaluation mode; nobody else may run it meanwhile.
    """

    def __init__(self, model: Any, limits: Limits, watcher: Watcher) -> None:
        self.model, self.limits, self._watcher = model, limits, watcher
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._change = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="spikellm-engine", daemon=True)
        self.failure: str | None = None

    @property
    def waiting(self) -> int:
        """Generations that were not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Generations that were."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether it takes generations."""
        return self._open and self._thread.is_alive()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Take generations on, all or none.

        Raises:
            FullError: too many wait.
            StoppedError: the engine is being stopped, or failed.
        """
        with self._change:
            self.require_room(len(generations))
            self._waiting.extend(generations)
            self._change.notify()

    def require_room(self, count: int) -> None:
        """Refuse so many generations where they cannot be taken now.

        Raises:
            FullError, StoppedError: see :meth:`submit`.
        """
        if not self.alive:
            raise StoppedError
        if self.waiting + self.running + count > self.limits.most:
            raise FullError

    def cancel(self, generations: Sequence[Generation]) -> None:
        """Nobody waits for these any more."""
        with self._change:
            for generation in generations:
                generation.cancelled = True
            self._change.notify()

    def wind_up(self) -> None:
        """Take nothing more, and give up what is under way as soon as may be."""
        with self._change:
            self._open = False
            self._change.notify()

    def stop(self) -> None:
        """The same, and wait until the thread has ended."""
        self.wind_up()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while self._turn():
                    pass
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._open = False
            for generation in [*self._waiting, *self._running]:
                if not generation.finished:
                    generation.fail("the server is being stopped", busy=True)

    def _turn(self) -> bool:
        """One round of work; whether another is to come."""
        with self._change:
            self._sort_out()
            if not self._open:
                return False
            idle = not (self._waiting or self._running)
            if not idle and self._waiting and len(self._running) < self.limits.parallel:
                self._running.append(self._waiting.popleft())
        if idle:
            self._tell(lambda: self._watcher.idle(self.model))
            with self._change:
                self._change.wait_for(lambda: self._waiting or not self._open, timeout=1.0)
            return True
        reading = next((one for one in self._running if one.done < len(one.asked.prompt)), None)
        if reading is not None:
            self._guarded([reading], lambda: self._read(reading))
        ready = [one for one in self._running if one.new and not one.finished]
        if ready:
            self._guarded(ready, lambda: self._step(ready))
        return True

    def _sort_out(self) -> None:
        """Let go of what is over, was given up, or took too long."""
        before = time.monotonic() - self.limits.seconds
        everyone = [*self._running, *self._waiting]
        for generation in everyone:
            if generation.arrived < before and not (generation.finished or generation.cancelled):
                generation.cut()
        over = [one for one in everyone if one.finished or one.cancelled]
        for generation in over:
            generation.cache = None
            self._tell(partial(self._watcher.ended, generation))
        if over:
            self._running[:] = [one for one in self._running if one not in over]
            self._waiting = deque(one for one in self._waiting if one not in over)

    def _read(self, generation: Generation) -> None:
        """Take the next piece of a prompt into the cache."""
        prompt, first = generation.asked.prompt, generation.done
        piece = list(prompt[first : first + self.limits.chunk])
        device = next(self.model.parameters()).device
        asked = generation.asked
        every = asked.echo and asked.logprobs is not None
        output = self.model(
            torch.tensor([piece], device=device),
            past_key_values=generation.cache,
            use_cache=True,
            **({} if every else {"logits_to_keep": 1}),
        )
        generation.cache = output.past_key_values
        generation.done = first + len(piece)
        self._tell(lambda: self._watcher.prompt(len(piece)))
        generation.read(first, output.logits[0])

    def _step(self, ready: Sequence[Generation]) -> None:
        rows = decode_each(self.model, [one.new[-1] for one in ready], [one.cache for one in ready])
        self._tell(lambda: self._watcher.step(len(ready)))
        for generation, logits in zip(ready, rows, strict=True):
            self._guarded([generation], partial(generation.take, logits))

    def _tell(self, news: Callable[[], None]) -> None:
        """Tell the watcher; what goes wrong there costs a figure, not the server."""
        try:
            news()
        except Exception:
            _log.exception("spikellm: a figure could not be taken")

    def _guarded(self, generations: Sequence[Generation], work: Callable[[], None]) -> None:
        """Do some work; what goes wrong ends the generations that it was for."""
        try:
            work()
        except Exception as error:
            _log.exception("spikellm: a generation failed")
            for generation in generations:
                if not generation.finished:
                    generation.fail(f"{type(error).__name__}: {error}")


def require_cache(model: Any) -> None:
    """Refuse a model that keeps no cache to go on with.

    Raises:
        RequestError: it keeps none.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        output = model(torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        raise RequestError(
            "the model keeps no keys and values between tokens, so nothing can be served with it;"
            " use `spikellm generate`"
        )
