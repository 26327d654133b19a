"""The command ``spikellm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Device, EnergyTable, Json, Model, Seqlen, Trust
from spikellm.commands.inputs import sources
from spikellm.core import console


@app.command()
def report(
    model: Model,
    text: Annotated[
        str, typer.Option("--text", metavar="NAME|PATH", help="Text to measure on.")
    ] = "stdlib",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Page to write; report.html unless --json is given alone."
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            "--beside",
            metavar="MODEL",
            help="Show this model beside it, the original for example. May be repeated.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Tokens to measure on, in whole windows.")
    ] = 4096,
    seqlen: Seqlen = None,
    energy_table: EnergyTable = None,
    json: Json = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write one page with what a model costs: operations, spikes, energy estimated from operation
    counts, sizes, errors.

    Examples:

      spikellm report out/w4a4 --text test.txt --beside ./model --out report.html

      spikellm report out/w4a4 --json - | jq .energy_pj
    """
    page = out or (None if json else Path("report.html"))
    reads = sources(models=[model, *(beside or ())], texts=[text], files=[energy_table])
    console.check_json_target(json, reads, {"--out": page})
    console.check_file_target("--out", page, reads)
    from spikellm.commands.report import report_to_page
    from spikellm.profiling.page import figures, verdict

    found = report_to_page(
        model,
        text,
        page,
        beside=beside or (),
        tokens=tokens,
        seqlen=seqlen,
        energy_table=energy_table,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if json:
        console.write_json(found.to_data(), json)
    if json != "-":
        console.table(verdict(found), ["what", "found", "of what"], figures(found), left=1)
        if page:
            console.note(f"the page is {page}")
