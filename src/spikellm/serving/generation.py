"""One generation: what was asked, how far it is, and what it has to say."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from spikellm.serving.sampling import Sampling, TokenLogprob, logprob_of
from spikellm.serving.text import TextStream, plain_text

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a generation is to do.

    Attributes:
        prompt: tokens.
        most: new tokens at most.
        ends: tokens that end it.
        stops: texts that end it.
        logprobs: how many of the likeliest tokens to name beside each; None for no logarithms.
        echo: give the prompt's text and logarithms, too.
        seed: decides what is sampled; drawn if None.
    """

    prompt: Sequence[int]
    most: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Piece:
    """What a generation says next.

    Attributes:
        logprobs: of the tokens that were added; of the first token of a prompt, which nothing
            predicts, none.
        finish: why it ended, in its last piece.
        error: what went wrong; then it is the last piece.
        busy: the error is no fault of the request, which may be sent again.
    """

    text: str = ""
    logprobs: tuple[TokenLogprob | int, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    busy: bool = False

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


class Generation:
    """A generation on its way.

    Args:
        emit: called with every piece, from the engine's thread.

    Attributes:
        cache: keys and values of the tokens that went through the model.
        done: tokens of the prompt that did.
        new: tokens that were generated.
        cancelled: nobody waits for it any more.
    """

    def __init__(self, asked: Asked, tokenizer: Any, emit: Callable[[Piece], None]) -> None:
        self.asked, self._emit, self._tokenizer = asked, emit, tokenizer
        self.cache: Any = None
        self.done = 0
        self.new: list[int] = []
        self.cancelled = False
        self.arrived = time.monotonic()
        self.first_token: float | None = None
        self._seen: Counter[int] = Counter()
        self._stream = TextStream(tokenizer, asked.prompt, asked.stops)
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if asked.seed is None else asked.seed)
        self.finished = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and what was generated."""
        return [*self.asked.prompt, *self.new]

    def read(self, first: int, logits: Tensor) -> None:
        """The prompt's tokens from ``first`` on went through the model.

        Args:
            logits: behind each of them, or behind the last of them alone, ``(tokens,
                vocabulary)``.
        """
        asked = self.asked
        if asked.echo and first == 0:
            found = (int(asked.prompt[0]),) if asked.logprobs is not None else ()
            self._emit(Piece(plain_text(self._tokenizer, asked.prompt), found))
        if asked.echo and asked.logprobs is not None:
            rows = zip(logits, asked.prompt[first + 1 : first + 1 + len(logits)], strict=False)
            known = tuple(logprob_of(row, int(token), asked.logprobs) for row, token in rows)
            self._emit(Piece("", known))
        if self.done == len(asked.prompt):
            if asked.most:
                self.take(logits[-1])
            else:
                self._end("length")

    def take(self, logits: Tensor) -> None:
        """Choose the next token from its logits, ``(vocabulary,)``, and say what it means."""
        asked = self.asked
        if not bool(torch.isfinite(logits).all()):
            self.fail("the model gives NaN or infinity for this prompt")
            return
        if self.first_token is None:
            self.first_token = time.monotonic()
        token = asked.sampling.choose(logits, self._seen, self._generator)
        self.new.append(token)
        self._seen[token] += 1
        known = () if asked.logprobs is None else (logprob_of(logits, token, asked.logprobs),)
        if token in asked.ends:
            self._end("stop", "", known)
            return
        text = self._stream.push(token)
        if self._stream.stopped:
            self._end("stop", text, known)
        elif len(self.new) >= asked.most:
            self._end("length", text, known)
        elif text or known:
            self._emit(Piece(text, known))

    def cut(self) -> None:
        """End it here, for want of time: with what it has, if it has a token."""
        if self.new:
            self._end("length")
        else:
            self.fail("the server was too busy to begin within the time limit", busy=True)

    def fail(self, reason: str, *, busy: bool = False) -> None:
        """End it with an error."""
        self.finished, self.cache = True, None
        self._emit(Piece(error=reason, busy=busy))

    def _end(
        self, finish: Finish, text: str = "", known: tuple[TokenLogprob | int, ...] = ()
    ) -> None:
        self.finished, self.cache = True, None
        self._emit(Piece(text + self._stream.finish(), known, finish))
