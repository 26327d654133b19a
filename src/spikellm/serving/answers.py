"""Answers in the form of the OpenAI protocol."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from spikellm.serving.generation import Asked, Finish, Piece
from spikellm.serving.sampling import TokenLogprob
from spikellm.serving.words import Word, Words

Logprobs = Sequence[TokenLogprob | int]


class Usage(NamedTuple):
    """Tokens of an answer."""

    prompt: int
    completion: int

    def to_data(self) -> dict[str, int]:
        """As the protocol has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Completion:
    """Answers of ``/v1/completions``."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, tokenizer: Any, asked: Sequence[Asked]) -> None:
        self._words = {
            index: Words(tokenizer, () if one.echo else one.prompt)
            for index, one in enumerate(asked)
            if one.logprobs is not None
        }
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The answer in one."""
        return {
            **self._head,
            "object": self.kind,
            "choices": list(choices),
            "usage": usage.to_data(),
        }

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: Usage | None = None
    ) -> dict[str, Any]:
        """A part of a stream."""
        last = {} if usage is None else {"usage": usage.to_data()}
        return {**self._head, "object": self.chunk_kind, "choices": list(choices), **last}

    def choice(
        self, index: int, text: str, logprobs: Logprobs | None, finish: Finish | None
    ) -> dict[str, Any]:
        """One whole answer."""
        return {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs),
            "finish_reason": finish,
        }

    def begin(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def delta(self, index: int, piece: Piece, *, known: bool) -> dict[str, Any]:
        """What a piece adds to a stream."""
        return self.choice(index, piece.text, piece.logprobs if known else None, piece.finish)

    def _logprobs(self, index: int, found: Logprobs) -> dict[str, Any]:
        words = self._words[index]
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in found:
            if isinstance(one, int):  # the first, which nothing predicts
                word = words.add(one)
                values.append(None)
                tops.append(None)
            else:
                rivals = [*one.top, *([(one.token, one.logprob)] if one.top else [])]
                named = {words.of(token).text: value for token, value in reversed(rivals)}
                word = words.add(one.token)
                values.append(one.logprob)
                tops.append(named or None)
            tokens.append(word.text)
            offsets.append(word.place)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatCompletion(Completion):
    """Answers of ``/v1/chat/completions``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(
        self, index: int, text: str, logprobs: Logprobs | None, finish: Finish | None
    ) -> dict[str, Any]:
        """One whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs),
            "finish_reason": finish,
        }

    def begin(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with: who speaks."""
        said = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": said, "logprobs": None, "finish_reason": None}]

    def delta(self, index: int, piece: Piece, *, known: bool) -> dict[str, Any]:
        """What a piece adds to a stream."""
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(index, piece.logprobs) if known else None,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, index: int, found: Logprobs) -> dict[str, Any]:
        words, content = self._words[index], []
        for one in found:
            assert not isinstance(one, int), "a chat echoes no prompt"
            rivals = [_named(words.of(token), value) for token, value in one.top]
            content.append({**_named(words.add(one.token), one.logprob), "top_logprobs": rivals})
        return {"content": content, "refusal": None}


def _named(word: Word, logprob: float) -> dict[str, Any]:
    return {"token": word.text, "logprob": logprob, "bytes": word.bytes}
