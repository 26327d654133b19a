"""Axes of a sweep: recipe fields with their values, and the settings that they make."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import yaml

from spikellm import api
from spikellm.commands.support.options import GridOptions
from spikellm.core.errors import RecipeError, RequestError
from spikellm.recipe import Recipe


class Axis(NamedTuple):
    """One recipe field and its values, as written."""

    key: str
    values: tuple[str, ...]


def parse_axis(text: str) -> Axis:
    """``key=a,b,c``; commas within brackets and quotes belong to a value.

    Raises:
        RequestError: no key, or no value.
    """
    key, _, values = text.partition("=")
    written = f"[{values}]"
    try:
        sequence = yaml.compose(written)  # whose parts know where they stand
        nodes = sequence.value if sequence else []
        parts = tuple(
            written[node.start_mark.index : node.end_mark.index].strip() for node in nodes
        )
    except yaml.YAMLError:
        parts = ()
    if not key.strip() or not parts or not all(parts):
        raise RequestError(
            f"--set {text!r}: expected key=value,value,…, for example"
            " activations.salient_rate=0.05,0.1"
        )
    return Axis(key.strip(), parts)


class Setting(NamedTuple):
    """A combination of values: what was set, and the recipe that it makes."""

    values: dict[str, str]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of a row: the fields with their values, or the recipe where nothing is set."""
        parts = [f"{key.rpartition('.')[2]} {value}" for key, value in self.values.items()]
        return ", ".join(parts) or self.recipe.name


def settings_of(recipe: str, axes: Sequence[Axis], options: GridOptions) -> list[Setting]:
    """All combinations of the axes' values, checked; those that make the same recipe are one.

    Raises:
        RequestError: an axis is named twice or changes words alone, or a combination is no valid
            recipe; names it.
    """
    keys = [axis.key for axis in axes]
    _require_apart(keys)
    found: dict[str, Setting] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = dict(zip(keys, values, strict=True))
        resolved = _resolved(recipe, chosen, options)
        same = json.dumps(resolved.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        found.setdefault(same, Setting(chosen, resolved))
    return list(found.values())


def _require_apart(keys: list[str]) -> None:
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RequestError(
            f"--set names {twice[0]} twice; give all its values at once, separated by commas"
        )
    if labels := sorted({"name", "description"}.intersection(keys)):
        raise RequestError(
            f"--set {labels[0]}: it changes words alone, not the result; name a field that does"
        )


def _resolved(recipe: str, chosen: dict[str, str], options: GridOptions) -> Recipe:
    settings = [f"{key}={value}" for key, value in chosen.items()]
    try:
        return api.resolve_recipe(
            recipe,
            options.calibration,
            options.samples,
            options.seqlen,
            next(iter(options.seeds), None),
            settings,
        )
    except RecipeError as error:
        raise RequestError(f"{', '.join(settings) or 'the recipe'}: {error}") from None
