"""Settings of single fields, also in the words of version 1.

See :mod:`spikellm.recipe.version_1`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spikellm.core.errors import RecipeError
from spikellm.core.warn import say_once
from spikellm.recipe import version_1 as old
from spikellm.recipe.parts import DEFAULTS, SECTIONS, as_mapping
from spikellm.recipe.values import place_value

Setting = tuple[str, Any]
_CHOICES = ("algorithm.name", "weights.format")  # come first, since others are theirs
_HEADS = tuple(f"attention.{head}" for head in old.HEADS)


def place_settings(data: dict[str, Any], settings: Sequence[Setting]) -> None:
    """Put settings onto plain data of version 2.

    Raises:
        RecipeError: a key that is no field, or options of a part that the recipe does not have.
    """
    rotation = [(key, value) for key, value in settings if key.partition(".")[0] == "rotation"]
    others = [one for one in settings if one not in rotation]
    ternary = any(one == ("weights.code", "ternary") for one in settings)
    algorithm = _chosen("algorithm", data, others)
    found: list[Setting] = []
    for key, value in others:
        if ternary and (key, value) in [("weights.bits", 2), ("weights.symmetric", True)]:
            continue  # version 1 asked for them
        new = list(_in_new_words(key, value, algorithm, _chosen("weights", data, others)))
        if new != [(key, value)]:
            _say(key, ", ".join(name for name, _ in new))
        found += new
    for key, value in sorted(found, key=lambda one: one[0] not in _CHOICES):
        place_value(data, key, value)
    if rotation:
        if any(key.partition(".")[0] == "transforms" for key, _ in others):
            raise RecipeError(
                f"{rotation[0][0]} and transforms set the same field; give transforms alone"
            )
        _rotate(data, rotation)
        _say(rotation[0][0], "transforms=[…]")


def new_key(key: str) -> str:
    """The key of version 2 for the field that a key of either version names."""
    section, _, field = key.partition(".")
    if key == "pipeline":
        return "algorithm.name"
    if section in old.ALGORITHMS:
        return f"algorithm.{_renamed(section, field)}" if field else "algorithm"
    if section in {"weights", "activations"}:
        return f"{section}.{_renamed(section, field)}" if field else key
    for head in _HEADS:
        if key.startswith(f"{head}."):
            return f"{head}.{_renamed('activations', key.removeprefix(f'{head}.'))}"
    return key


def _in_new_words(key: str, value: Any, algorithm: Any, chosen: str) -> Iterable[Setting]:
    section, _, field = key.partition(".")
    if section in old.ALGORITHMS:
        options = old.algorithm_of(section, {field: value} if field else value, algorithm)
        if field:
            return [(f"algorithm.{name}", one) for name, one in options.items()]
        return [("algorithm", {"name": section, **options})] if section == algorithm else []
    if key == "weights" and old.has_old_words("weights", value):
        return [(key, old.weights_of(value))]
    if key == "attention":
        return [(key, old.attention_of(value))]
    if key == "activations" or key in _HEADS:
        return [(key, old.renamed("activations", value))]
    if key == "overrides" and old.has_old_overrides(value):
        return [(key, old.overrides_of(value, chosen))]
    return [(new_key(key), value)]


def _renamed(section: str, field: str) -> str:
    return str(next(iter(old.renamed(section, {field: None}))))


def _chosen(section: str, data: Mapping[str, Any], settings: Iterable[Setting]) -> Any:
    """The part that a section of a recipe names once settings are put onto it."""
    kind, found = SECTIONS[section], data.get(section, {})
    choice = f"{section}.{kind.tag}"
    for key, value in settings:
        if new_key(key) == choice:
            return value
        if key == section:
            found = old.renamed(section, value)
    options = as_mapping(kind, found)
    return options.get(kind.tag, DEFAULTS[section]) if isinstance(options, Mapping) else None


def _rotate(data: dict[str, Any], settings: Iterable[Setting]) -> None:
    """Put settings of the section ``rotation`` onto the transforms."""
    rotation, others = old.rotation_of(data.get("transforms"))
    for key, value in settings:
        _, _, field = key.partition(".")
        if field:
            rotation[field] = value
        elif isinstance(value, Mapping):
            rotation = dict(value)
        else:
            raise RecipeError(f"rotation: expected keys and values, found {value!r}")
    coded = old.has_coded_keys(data.get("attention"))
    data["transforms"] = [*others, *old.transforms_of(rotation, coded_keys=coded)]


def _say(key: str, new: str) -> None:
    say_once(f"--set {key} is of version 1; version 2 calls it {new}", "setting")
