"""The command ``spikellm recipes``."""

from __future__ import annotations

from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Json, Set
from spikellm.commands.inputs import sources
from spikellm.core import console
from spikellm.core.errors import RequestError
from spikellm.recipe.settings import require_apart


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="Preset or file to print as YAML; all presets are listed without it."),
    ] = None,
    settings: Set = None,
    json: Json = None,
) -> None:
    """List the presets, or print one recipe in full as YAML.

    Example: spikellm recipes w4a4-t2 > mine.yaml
    """
    console.check_json_target(json, sources(recipes=[name] if name else ()))
    from spikellm.recipe.load import load_recipe, preset_names

    if name is None and settings:
        raise RequestError(
            "--set changes one recipe; name it, for example `spikellm recipes w4a4-t2 --set"
            " weights.bits=3`"
        )
    if name is not None:
        require_apart(settings or ())
        recipe = load_recipe(name, settings or ())
        if json:
            console.write_json(recipe.model_dump(mode="json"), json)
        if json != "-":
            print(recipe.to_yaml(named=False), end="")
        return
    presets = {preset: load_recipe(preset).description for preset in preset_names()}
    if json:
        console.write_json(presets, json)
    if json != "-":
        console.table(
            "Presets",
            ["name", "what it does"],
            [[preset, text] for preset, text in presets.items()],
            left=2,
        )
