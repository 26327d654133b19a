"""Functions whose optional keywords are a ``TypedDict``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spikellm.core.registry import unknown_name


def require_known_keywords(
    function: str, given: Mapping[str, object], valid: Iterable[str]
) -> None:
    """Refuse keywords that a function does not have.

    Raises:
        TypeError: names the nearest valid keyword.
    """
    valid = list(valid)
    for name in given:
        if name not in valid:
            raise TypeError(unknown_name(f"keyword of {function}", name, valid))
