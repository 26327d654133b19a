"""Other settings for some modules, chosen by patterns over their full names."""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import regex
from pydantic import Field, field_validator, model_validator

from spikellm.core.errors import RecipeError
from spikellm.recipe.base import Section, WeightOptions
from spikellm.recipe.parts import as_mapping

MOST_CHARACTERS = 1000
MOST_REPEATS = 10_000  # the counts of an expression multiplied; repeated text takes memory
PATIENCE = 2.0  # seconds that one expression may take for all names together
EXPRESSION = "re:"  # begins a pattern that is a regular expression
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_CALL = re.compile(r"\(\?(?:R|&|P>|[+-]?\d)")  # of a group by itself, which never ends
_NOT_IN_NAMES = re.compile(r"^\.|[\\()|+^$]")  # and neither in globs of names


class Pattern:
    """Says which names a pattern matches as a whole.

    A glob (``*`` any characters, dots included; ``?`` one; ``[ab]`` one of these), or after ``re:``
    a regular expression.

    Raises:
        ValueError: it is too long, no regular expression, or one without ``re:``.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"a pattern of {len(text):,} characters; expected at most {MOST_CHARACTERS:,}"
            )
        self.text = text
        self._spent = 0.0
        self._known: dict[str, bool] = {}
        self._found: Callable[[str], bool]
        if text.startswith(EXPRESSION):
            self._expression = _compiled(text.removeprefix(EXPRESSION))
            self._found = self._search
        elif is_expression(text):
            raise ValueError(
                f"{text!r} is a regular expression; write {EXPRESSION + text!r}, or a glob such as"
                " '*.down_proj'"
            )
        else:
            glob = re.compile(fnmatch.translate(text))
            self._found = lambda name: glob.match(name) is not None

    def matches(self, name: str) -> bool:
        """Whether it matches a full name.

        Raises:
            RecipeError: a regular expression takes longer than :data:`PATIENCE`.
        """
        if name not in self._known:
            self._known[name] = self._found(name)
        return self._known[name]

    def _search(self, name: str) -> bool:
        before = time.monotonic()
        try:
            found = self._expression.fullmatch(name, timeout=max(PATIENCE - self._spent, 1e-3))
        except TimeoutError:
            raise RecipeError(
                f"override {self.text[:100]!r}: the expression takes longer than {PATIENCE:g} s"
                f" to match names such as {name[:100]!r}; write it more simply, or as a glob"
            ) from None
        self._spent += time.monotonic() - before
        return found is not None


def is_expression(text: str) -> bool:
    """Whether a pattern without ``re:`` can only be a regular expression: no name of a module
    begins with a dot or holds ``( ) | + ^ $`` or a backslash.
    """
    return _NOT_IN_NAMES.search(text) is not None


def _compiled(text: str) -> regex.Pattern[str]:
    counts = [int(one or 1) for found in _COUNT.findall(text) for one in found]
    if math.prod(max(one, 1) for one in counts) > MOST_REPEATS:
        raise ValueError(f"{text[:100]!r} repeats more than {MOST_REPEATS:,} times")
    if _CALL.search(text):
        raise ValueError(f"{text[:100]!r} calls a group of its own, which is not read")
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{text[:100]!r} is not a regular expression: {error}") from None


class Override(Section):
    """Other settings for the modules whose full name a pattern matches (see :class:`Pattern`)."""

    match: str = Field(description="glob over full names, or re: and a regular expression")
    skip: bool = Field(False, description="leave these modules as they are")
    weights: dict[str, Any] = Field(default_factory=dict)
    activations: dict[str, Any] = Field(default_factory=dict)

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        Pattern(value)
        return value

    @field_validator("weights", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return as_mapping(WeightOptions, value)

    @model_validator(mode="after")
    def _has_an_effect(self) -> Override:
        if self.skip == bool(self.weights or self.activations):
            raise ValueError(
                f"the override for {self.match!r} must either skip or set weights / activations"
            )
        return self

    @cached_property
    def pattern(self) -> Pattern:
        """What says which modules it is for."""
        return Pattern(self.match)
