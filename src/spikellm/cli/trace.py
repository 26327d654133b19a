"""The command ``spikellm trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Device, Json, Model, Trust
from spikellm.commands.inputs import sources
from spikellm.core import console
from spikellm.core.errors import NumericalError


@app.command()
def trace(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for pictures, events and figures.")
    ],
    text: Annotated[
        str, typer.Option("--text", metavar="NAME|PATH", help="Text whose first window is run.")
    ] = "stdlib",
    layer: Annotated[int, typer.Option("--layer", help="Decoder block, from 0.")] = 0,
    token: Annotated[
        int | None, typer.Option("--token", help="Token to draw, from 0; the last one by default.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            help="Layer of the block to draw, for example mlp.down_proj; the first by default.",
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens of the window; 64 by default.")
    ] = None,
    nir: Annotated[
        bool,
        typer.Option(
            "--nir", help="Write the layer that is drawn as a NIR graph, read it back and run it."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the trace in --out.")] = False,
    json: Json = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Run a decoder block spike by spike and show that it ends in the same integers.

    Status 1 if it does not.

    Writes raster.svg, membrane.svg, events.npz and trace.json.

    Example: spikellm trace out/w4a4 --text text.txt --layer 0 --out out/trace
    """
    console.check_json_target(json, sources(models=[model], texts=[text]), {"--out": out})
    from spikellm.commands import trace

    result = trace.trace_to_folder(
        model,
        text,
        out,
        layer=layer,
        token=token,
        part=part,
        seqlen=seqlen,
        nir=nir,
        overwrite=force,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if json:
        console.write_json(result, json)
    if json != "-":
        trace.show(result)
    if not result["equal"] or (nir and result["nir"]["mismatches"]):
        raise NumericalError(
            f"binary and merged form of {result['block']} differ; {out / 'trace.json'} tells where"
        )
