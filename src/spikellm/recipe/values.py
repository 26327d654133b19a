"""Single fields of plain recipe data, by dotted keys."""

from __future__ import annotations

from typing import Any

from spikellm.core.errors import RecipeError
from spikellm.core.registry import unknown_name
from spikellm.recipe.parts import DEFAULTS, SECTIONS, as_mapping, changed_options
from spikellm.recipe.short_forms import SHORT_FORMS, forget_spread


def place_value(data: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key of plain recipe data.

    ``weights.format`` and ``algorithm.name`` choose another part: of the options so far those stay
    that both parts have. An entry of ``transforms`` is named by its name:
    ``transforms.online-rotation.choose``.

    Raises:
        RecipeError: a part of the key is no section.
    """
    first, _, field = key.partition(".")
    if key in SHORT_FORMS:
        forget_spread(data, key)
    kind = SECTIONS.get(first)
    if kind is not None and field:
        section = as_mapping(kind, data.get(first))
        section = {kind.tag: DEFAULTS[first]} if section is None else section
        if isinstance(section, dict) and "." not in field:
            data[first] = changed_options(
                kind, {kind.tag: DEFAULTS[first], **section}, {field: value}
            )
            return
        data[first] = section
    if first == "transforms":
        data.setdefault(first, [])
    _place(data, key.split("."), value, key)


def _place(data: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    *sections, field = path
    for place, section in enumerate(sections):
        found = data.setdefault(section, {})
        if isinstance(found, (list, tuple)) and place + 1 < len(sections):
            found = data[section] = [
                {"name": one} if isinstance(one, str) else one for one in found
            ]
            _place(_entry(found, sections[place + 1], key), path[place + 2 :], value, key)
            return
        data = found
        if not isinstance(data, dict):
            raise RecipeError(f"key {key!r}: {section!r} is no section of a recipe")
    data[field] = value


def _entry(entries: list[Any], name: str, key: str) -> dict[str, Any]:
    """The entry of a list that has this name."""
    names = [str(one.get("name")) for one in entries if isinstance(one, dict)]
    if name not in names:
        raise RecipeError(f"key {key!r}: {unknown_name('entry', name, names)}")
    found: dict[str, Any] = next(
        one for one in entries if isinstance(one, dict) and one.get("name") == name
    )
    return found
