"""The command ``spikellm doctor``."""

from __future__ import annotations

from spikellm.cli.application import app
from spikellm.cli.options import Json
from spikellm.core import console


@app.command()
def doctor(json: Json = None) -> None:
    """Show versions, processor features and the kernels in use."""
    console.check_json_target(json)
    from spikellm.commands.doctor import examine

    result = examine()
    if json:
        console.write_json(result, json)
    if json != "-":
        console.table(
            "spikellm doctor",
            ["what", "found"],
            [[key, str(value)] for key, value in result.items()],
            left=2,
        )
