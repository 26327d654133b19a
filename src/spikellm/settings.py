"""Fields of a recipe as they are set from outside: each once, since of two values one would be dropped unseen."""

from __future__ import annotations

from collections.abc import Iterable

from spikellm.errors import RequestError


def require_apart(settings: Iterable[str], given: Iterable[str] = ()) -> None:
    """Refuse settings that touch the same field, or one that an option of its own gives.

    Args:
        settings: ``key=value`` each.
        given: fields that have a value already, ``calibration.samples`` for example.

    Raises:
        RequestError: two touch the same field; names both.
    """
    named = [(key, f"--{key.removesuffix('.text').rpartition('.')[2]}") for key in given]
    for setting in settings:
        key = setting.partition("=")[0]
        for other, words in named:
            if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                raise RequestError(f"--set {setting} and {words} set the same field of the recipe; give one of them")
        named.append((key, f"--set {setting}"))
