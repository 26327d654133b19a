"""What each token adds to a text, as logarithms of probabilities name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from spikellm.serving.text import CONTEXT, INCOMPLETE, plain_text


class Word(NamedTuple):
    """A token in its place.

    Attributes:
        text: what it adds, or its own name if that is special; ends with U+FFFD where a character
            is not whole yet.
        whole: whether it is whole characters, so that ``text`` has its bytes.
        place: characters of the text before it.
    """

    text: str
    whole: bool
    place: int

    @property
    def bytes(self) -> list[int] | None:
        """Its bytes; None where it is part of a character."""
        return list(self.text.encode()) if self.whole else None


class Words:
    """Tokens of one text, one after the other.

    Args:
        before: tokens that stand in front of it and are not part of it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer, self._before = tokenizer, list(before[-CONTEXT:])
        self._special = set(tokenizer.all_special_ids)
        self._place = 0

    def of(self, token: int) -> Word:
        """A token that might come next."""
        if token in self._special:
            return Word(str(self._tokenizer.decode([token])), True, self._place)
        before = plain_text(self._tokenizer, self._before)
        begun = before.endswith(INCOMPLETE)
        after = plain_text(self._tokenizer, [*self._before, token])
        text = after[len(before) - begun :]
        return Word(text, not begun and not text.endswith(INCOMPLETE), self._place)

    def add(self, token: int) -> Word:
        """The token that comes next."""
        word = self.of(token)
        if token not in self._special:
            self._place += len(word.text.removesuffix(INCOMPLETE))
        self._before = [*self._before, token][-CONTEXT:]
        return word
