"""The command ``spikellm inspect``."""

from __future__ import annotations

from spikellm.cli.application import app
from spikellm.cli.options import Json, Model, Trust
from spikellm.commands.inputs import sources
from spikellm.core import console


@app.command()
def inspect(model: Model, json: Json = None, trust_remote_code: Trust = False) -> None:
    """Show layers, bits, steps and sizes of a model, converted or not.

    Example: spikellm inspect out/w4a4
    """
    console.check_json_target(json, sources(models=[model]))
    from spikellm.commands.inspect import inspect_model, show_inspection

    result = inspect_model(model, trust_remote_code=trust_remote_code)
    if json:
        console.write_json(result, json)
    if json != "-":
        show_inspection(result)
