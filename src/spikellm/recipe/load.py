"""Presets and recipe files: from a name or a YAML file to a recipe.

A preset is a file in this folder; adding one is adding a file. ``--set weights.bits=3`` changes
single fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spikellm.core.errors import RecipeError
from spikellm.core.files import exists
from spikellm.core.io import PlainDataError, read_text, read_yaml
from spikellm.core.registry import unknown_name
from spikellm.recipe.migrate import upgraded
from spikellm.recipe.old_settings import place_settings
from spikellm.recipe.whole import Recipe, validated

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(source: str | Path | Recipe, settings: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a preset's name, a YAML file, or a recipe.
        settings: ``key=value`` pairs with dotted keys, applied on top; values are read as YAML.

    Raises:
        RecipeError: unknown name, unreadable file, unknown key or value out of range; names what is
            valid.
    """
    if isinstance(source, Recipe):
        data: dict[str, Any] = source.model_dump()
        where = f"recipe {source.name!r}"
    else:
        data, where = _read(str(source))
    settings = list(settings)
    place_settings(data, [_parsed(setting) for setting in settings])
    if (
        settings
        and data.get("name")
        and not any(setting.startswith("name=") for setting in settings)
    ):
        data["name"] = f"{data['name']} with {' '.join(', '.join(settings).split())}"
    return validated(data, where)


def _read(source: str) -> tuple[dict[str, Any], str]:
    if source in preset_names():
        text = (_FOLDER / f"{source}.yaml").read_text(encoding="utf-8")
        return {"name": source, **read_yaml(text)}, f"preset {source!r}"
    path = Path(source)
    if not exists(path) or path.is_dir():
        looks_like_path = path.suffix in {".yaml", ".yml"} or len(path.parts) > 1
        raise RecipeError(
            f"recipe file {source} does not exist; give a YAML file or a preset"
            if looks_like_path
            else unknown_name("recipe", source, preset_names())
        )
    try:
        data = read_yaml(read_text(path))
    except (PlainDataError, OSError) as error:
        raise RecipeError(
            f"recipe file {source} cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe file {source} holds {type(data).__name__}, expected keys and values; `spikellm"
            " recipes w4a4-t2` prints one to start from"
        )
    where = f"recipe file {source}"
    return {"name": path.stem, **upgraded(data, where, source)}, where


def _parsed(setting: str) -> tuple[str, Any]:
    """Key and value of a setting."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {setting!r}: expected key=value, for example weights.bits=3")
    try:
        value = read_yaml(text)
    except PlainDataError:
        raise RecipeError(f"--set {setting!r}: {text!r} is not a YAML value") from None
    return key, value
