"""Regular expressions from recipes that nobody vouches for: those that could be tried in too many
ways are refused, since the library's matcher tries one way after the other.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

MOST_CHARACTERS = 1000
MOST_WAYS = 2e8
_NAME = 200  # characters of a name; those of modules are shorter
_LONG = 50  # a repeat of so many counts is as bad as one without a bound
_PLAIN = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}
_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def ways(pattern: str) -> float:
    """At most in how many ways a pattern can be tried on a name of 200 characters.

    Repeats in sequence share the characters among them, so k without a bound give about 200ᵏ / k!
    ways; one within another, or alternatives within one that may begin alike, give exponentially
    many.

    Raises:
        ValueError: not a regular expression, longer than :data:`MOST_CHARACTERS`, or more ways than
            :data:`MOST_WAYS`.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(
            f"a pattern of {len(pattern):,} characters; expected at most {MOST_CHARACTERS:,}"
        )
    try:
        re.compile(pattern)
        found = _of_sequence(_parser.parse(pattern))
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    except (RecursionError, OverflowError):  # of the library's own
        raise ValueError(
            "a pattern that is nested too deeply, or repeats too often; write it more simply"
        ) from None
    if found > MOST_WAYS:
        raise ValueError(
            f"{pattern[:100]!r} may take for ever to match: a repeat within another one, too many"
            " in a row (at most four like '.*'), or repeated alternatives that begin alike; write"
            " it more simply"
        )
    return found


def _of_sequence(sequence: Any) -> float:
    items = list(_flat(sequence))
    product, long = 1.0, 0
    for name, value in items:
        found = _of_item(name, value)
        long += name in _REPEATS and found > _LONG
        product = min(product * found, math.inf)
    return max(1.0, product / math.factorial(min(long, 100)))


def _flat(sequence: Any) -> Iterator[tuple[str, Any]]:
    """Parts by name of what they are, groups opened."""
    for operation, value in sequence:
        if str(operation) == "SUBPATTERN":
            yield from _flat(value[-1])
        else:
            yield str(operation), value


def _of_item(name: str, value: Any) -> float:
    if name in _PLAIN:
        return 1.0
    if name in _REPEATS:
        return _of_repeat(int(value[0]), int(value[1]), value[2])
    if name == "BRANCH":
        parts = [_of_sequence(part) for part in value[1]]
        return max(parts) if _differ_at_once(value[1]) else sum(parts)
    if name in {"ASSERT", "ASSERT_NOT"}:
        return _of_sequence(value[1])
    if name == "ATOMIC_GROUP":
        return _of_sequence(value)
    if name == "GROUPREF":
        return float(_NAME)
    return math.inf  # nothing that names of modules call for


def _of_repeat(least: int, most: int, body: Any) -> float:
    inner, width = _of_sequence(body), int(body.getwidth()[0])
    turns = min(
        most, _NAME // max(width, 1)
    )  # a body that may be empty is not tried again once it was
    choices = max(0, turns - least) + 1
    if width == 0:
        choices = max(choices, least)
        turns = max(turns, least)
    return float(choices) if inner == 1 else choices * math.exp(min(700, turns * math.log(inner)))


def _differ_at_once(alternatives: Any) -> bool:
    """Whether alternatives begin with characters that differ, so that one at most can be meant."""
    first: list[tuple[str, Any]] = [next(_flat(part), ("", None)) for part in alternatives]
    return all(name == "LITERAL" for name, _ in first) and len(
        {chr(value).casefold() for _, value in first}
    ) == len(first)
