"""Recipes of version 1 are read as version 2 (see :mod:`spikellm.recipe.version_1`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikellm.core.errors import RecipeError
from spikellm.core.warn import say_once
from spikellm.recipe import version_1 as old

_OLD_KEYS = {"pipeline", "rotation", *old.ALGORITHMS}


def is_old(data: Mapping[str, Any]) -> bool:
    """Whether plain recipe data is of version 1: it says so, or names no version and has words of
    version 1.
    """
    if "version" in data:
        return bool(data["version"] == 1)
    attention = old.mapping(data.get("attention"))
    return (
        not _OLD_KEYS.isdisjoint(data)
        or old.has_old_words("weights", data.get("weights"))
        or old.has_old_words("activations", data.get("activations"))
        or any(old.has_old_words("activations", attention.get(head)) for head in old.HEADS)
        or old.has_old_overrides(data.get("overrides"))
    )


def upgraded(data: Mapping[str, Any], where: str, source: str | None = None) -> dict[str, Any]:
    """Plain recipe data as version 2 has it; says once in a process that it was of version 1.

    Args:
        where: what the data is, in words.
        source: a file that the command line can read it from, if there is one.

    Raises:
        RecipeError: words of version 1 that cannot be said in version 2.
    """
    if not is_old(data):
        return dict(data)
    try:
        found = migrated(data)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    how = f"; `spikellm recipes {source}` prints it as version 2" if source else ""
    say_once(f"{where} is of version 1, and is read as version 2{how}", "recipe")
    return found


def migrated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of version 1 as version 2 says it.

    Raises:
        RecipeError: a section of an algorithm that was not chosen, or words of both versions.
    """
    if both := sorted({"algorithm", "transforms"} & data.keys()):
        raise RecipeError(
            f"{both[0]} is of version 2, and the recipe of version 1; set version to 2 and write"
            " all of it so"
        )
    found = {key: value for key, value in data.items() if key not in _OLD_KEYS and key != "version"}
    algorithm: dict[str, Any] = {"name": data.get("pipeline", "rtn")}
    for section in old.ALGORITHMS:
        algorithm.update(old.algorithm_of(section, data.get(section, {}), algorithm["name"]))
    weights = old.weights_of(found.get("weights", {}))
    attention = old.attention_of(found.get("attention", {}))
    coded = old.has_coded_keys(attention)
    new = {
        "algorithm": algorithm,
        "weights": weights,
        "activations": old.renamed("activations", found.get("activations", {})),
        "attention": attention,
        "transforms": old.transforms_of(data.get("rotation", {}), coded_keys=coded),
        "overrides": old.overrides_of(found.get("overrides", []), old.format_of(weights)),
    }
    return {"version": 2, **found, **{key: value for key, value in new.items() if value}}
