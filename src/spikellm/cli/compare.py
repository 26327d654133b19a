"""The command ``spikellm compare``."""

from __future__ import annotations

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
    Set,
    Table,
    Texts,
    Trust,
    require_style,
    whole_numbers,
)
from spikellm.commands.inputs import sources
from spikellm.core import console


@app.command()
def compare(
    model: Model,
    recipes: Annotated[
        str,
        typer.Option(
            "--recipes", metavar="A,B,…", help="Presets or YAML files, separated by commas."
        ),
    ],
    perplexity: Texts,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seeds: Seeds = None,
    limit: Limit = None,
    settings: Set = None,
    table: Table = "table",
    energy_table: EnergyTable = None,
    device: Device = None,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a model with several recipes and print one table. Nothing is saved.

    Examples:

      spikellm compare ./model --recipes rtn-w4a4,w4a4-t2 --calibration train.txt --perplexity
      test.txt

      spikellm compare ./model --recipes pbllm-90,ternary-1.7 --seeds 2,3,4 --perplexity test.txt
      --table latex > table.tex
    """
    names = [name.strip() for name in recipes.split(",") if name.strip()]
    reads = sources(
        models=[model],
        texts=[*perplexity, calibration],
        recipes=names,
        settings=settings or (),
        files=[energy_table],
    )
    console.check_json_target(json, reads)
    style = require_style(table, json)
    from spikellm.commands import compare

    result = compare.compare(
        model,
        names,
        perplexity,
        calibration,
        samples=samples,
        seqlen=seqlen,
        seeds=whole_numbers("--seeds", seeds),
        limit=limit,
        settings=settings or (),
        energy_table=energy_table,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if json:
        console.write_json(result, json)
    if json != "-":
        compare.show(result, style)
