"""The command ``spikellm demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Json
from spikellm.core import console


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", help="Keep the converted models in this folder.")
    ] = None,
    json: Json = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the models of these recipes in --out.")
    ] = False,
) -> None:
    """Convert the bundled model with several recipes and compare them. No download, about a minute.

    Example: spikellm demo --out spiking
    """
    from spikellm.commands.demo import RECIPES, run

    console.check_json_target(
        json, writes={f"--out, {name}:": out / name for name in RECIPES} if out else None
    )
    result = run(out, overwrite=force)
    if json:
        console.write_json(result, json)
    if json != "-":
        from spikellm.commands.demo import show

        show(result)
