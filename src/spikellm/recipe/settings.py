"""Fields of a recipe as they are set from outside: each once, since of two values one would be
dropped unseen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spikellm.core.errors import RequestError
from spikellm.core.io import PlainDataError, read_yaml
from spikellm.recipe.old_settings import new_key
from spikellm.recipe.parts import SECTIONS, as_mapping


def require_apart(settings: Iterable[str], given: Iterable[str] = ()) -> None:
    """Refuse settings that touch the same field, or one that an option of its own gives.

    A section may be set first and a field of it afterwards, if the section leaves it out.

    Args:
        settings: ``key=value`` each.
        given: fields that have a value already, ``calibration.samples`` for example.

    Raises:
        RequestError: two touch the same field; names both.
    """
    before: list[tuple[str, set[str], str]] = []
    later = [(key, {key}, f"--{key.removesuffix('.text').rpartition('.')[2]}") for key in given]
    for key, fields, words in [*map(_read, settings), *later]:
        for other, others, other_words in before:
            dropped = other.startswith(f"{key}.")  # a section replaces all that was set in it
            if dropped or any(_touch(one, two) for one in fields for two in others):
                raise RequestError(
                    f"{other_words} and {words} set the same field of the recipe; give one of them"
                )
        before.append((key, fields, words))


def _read(setting: str) -> tuple[str, set[str], str]:
    key, _, text = setting.partition("=")
    key = new_key(key)
    try:
        value = read_yaml(text)
    except PlainDataError:  # told where the recipe is made
        value = None
    if key in SECTIONS:
        value = as_mapping(SECTIONS[key], value)
    return key, set(_fields(key, value)) if isinstance(value, dict) else {key}, f"--set {setting}"


def _fields(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [new_key(key)]
    return [field for name, part in value.items() for field in _fields(f"{key}.{name}", part)]


def _touch(one: str, two: str) -> bool:
    return one == two or one.startswith(f"{two}.") or two.startswith(f"{one}.")
