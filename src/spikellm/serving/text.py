"""Text of tokens as they come: nothing is given out that a later token, or a stop, would change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6  # tokens in front that decide about spaces
_BYTES = 4  # of the longest character
INCOMPLETE = "\ufffd"  # of a character whose bytes are not all there


class TextStream:
    """What a generation's tokens say, piece by piece.

    Args:
        before: tokens of the prompt, the last of which are context.
        stops: texts that end the generation; they are not given out.

    Attributes:
        stopped: whether a stop was found, after which nothing more is given.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens = list(before[-CONTEXT:])
        self._known = self._text()  # what the context says
        self._held = ""
        self._pending = 0  # tokens since a character was begun that is not whole
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain once this token is there; often none."""
        self._tokens.append(token)
        text = self._text()
        if text.endswith(INCOMPLETE):  # only the last character may still change
            new = text[len(self._known) : -1]
            self._known = max(self._known, text[:-1], key=len)  # what was said stays said
            self._pending = 1 if new else self._pending + 1
            if self._pending < _BYTES:
                return self._release(new)
        self._pending = 0
        new = text[len(self._known) :]
        self._tokens = self._tokens[-CONTEXT:]
        self._known = self._text()
        return self._release(new)

    def finish(self) -> str:
        """What was held back, if no stop came."""
        rest = "" if self.stopped else self._text()[len(self._known) :]
        new = self._release(rest)
        held, self._held = ("" if self.stopped else self._held), ""
        return new + held

    def _text(self) -> str:
        return plain_text(self._tokenizer, self._tokens)

    def _release(self, new: str) -> str:
        """Add text to what is held, and give what no stop can begin in."""
        if self.stopped:
            return ""
        held = self._held + new
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def plain_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What tokens say, without special ones; no space is moved."""
    found = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(found)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop may begin with."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if stop.startswith(text[-size:])), 0)
