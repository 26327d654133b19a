"""The command ``spikellm sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import (
    Calibration,
    Device,
    EnergyTable,
    Json,
    Limit,
    Model,
    Samples,
    Seeds,
    Seqlen,
    Table,
    Texts,
    Trust,
    require_style,
    whole_numbers,
)
from spikellm.commands.inputs import sources
from spikellm.core import console


@app.command()
def sweep(
    model: Model,
    perplexity: Texts,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Preset or YAML file to start from.")
    ] = "w4a4-t2",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=A,B,…",
            help="Values of a recipe field; all combinations are tried. May be repeated.",
        ),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seeds: Seeds = None,
    limit: Limit = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help=(
                "Keep finished points, table and plot here; the same command goes on where it"
                " stopped."
            ),
        ),
    ] = None,
    table: Table = "table",
    energy_table: EnergyTable = None,
    device: Device = None,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Try all combinations of recipe settings: perplexity against steps and arithmetic effort,
    Pareto front marked.

    Example: spikellm sweep ./model --recipe w4a4-t2 --set activations.salient_rate=0.02,0.1 --set
        activations.salient_steps=2,4 --calibration train.txt --perplexity test.txt --out sweep
    """
    reads = sources(
        models=[model], texts=[*perplexity, calibration], recipes=[recipe], files=[energy_table]
    )
    console.check_json_target(json, reads, {"--out": out})
    style = require_style(table, json)
    from spikellm.commands import sweep as sweeping

    result = sweeping.sweep(
        model,
        recipe,
        settings or (),
        perplexity,
        calibration,
        samples=samples,
        seqlen=seqlen,
        seeds=whole_numbers("--seeds", seeds),
        limit=limit,
        out=out,
        energy_table=energy_table,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if json:
        console.write_json(result, json)
    if json != "-":
        sweeping.show(result, style)
        if out:
            console.note(f"points, table and plot are in {out}")
