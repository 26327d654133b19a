"""The verb ``recipes``: the presets, or one recipe in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from spikellm.commands.support.options import Settings
from spikellm.commands.support.verb import Argument, verbs
from spikellm.core import console
from spikellm.core.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """What is changed in the recipe."""

    settings: Settings = ()


_DEFAULT = RecipesOptions()


@verbs.register("recipes")
def recipes(
    name: Annotated[
        str | None,
        Argument(
            "Preset or file to print as YAML; all presets are listed without it.", reads="recipes"
        ),
    ] = None,
    options: RecipesOptions = _DEFAULT,
) -> dict[str, Any]:
    """List the presets, or print one recipe in full as YAML.

    Example: spikellm recipes w4a4-t2 > mine.yaml

    Returns:
        The recipe ``name`` as plain data; without a name the description of each preset by its
        name.

    Raises:
        RecipeError: there is no such recipe, or it is not valid.
        RequestError: settings without a recipe, or two of one field.
    """
    from spikellm.recipe.load import load_recipe, preset_names
    from spikellm.recipe.settings import require_apart

    if name is None:
        if options.settings:
            raise RequestError(
                "--set changes one recipe; name it, for example `spikellm recipes w4a4-t2 --set"
                " weights.bits=3`"
            )
        return {preset: load_recipe(preset).description for preset in preset_names()}
    require_apart(options.settings)
    return load_recipe(name, options.settings).model_dump(mode="json")


def show(result: dict[str, Any], name: str | None) -> None:
    """Print a recipe as YAML, or the table of presets."""
    if name is None:
        rows = [[preset, text] for preset, text in result.items()]
        console.table("Presets", ["name", "what it does"], rows, left=2)
        return
    from spikellm.recipe import recipe_from

    print(recipe_from(result, f"recipe {name}").to_yaml(named=False), end="")
