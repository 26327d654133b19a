"""The command ``spikellm bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Json, Model, Trust
from spikellm.commands.inputs import sources
from spikellm.core import console


@app.command()
def bench(
    model: Model,
    original: Annotated[
        str | None,
        typer.Option(
            "--original", metavar="MODEL", help="Time this model beside it, in the same run."
        ),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.")] = 128,
    new: Annotated[
        int, typer.Option("--new-tokens", help="Tokens decoded after it, one at a time.")
    ] = 64,
    repeat: Annotated[
        int, typer.Option("--repeat", help="Turns of each model; medians are shown.")
    ] = 3,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of torch.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Type that an original runs in: bfloat16 (default), float16, float32."
        ),
    ] = None,
    energy: Annotated[
        bool,
        typer.Option(
            "--energy",
            help="Read the machine's energy counters (Linux powercap), where there are any.",
        ),
    ] = False,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Time a model: prefill, decode, time to the first token, peak memory, size on disk.

    Example: spikellm bench out/w4a4 --original ./model --threads 1
    """
    console.check_json_target(json, sources(models=[model, original]))
    from spikellm.commands import bench as benchmark

    result = benchmark.bench(
        model,
        original,
        prompt=prompt,
        new=new,
        repeat=repeat,
        threads=threads,
        dtype=dtype,
        energy=energy,
        trust_remote_code=trust_remote_code,
    )
    if json:
        console.write_json(result, json)
    if json != "-":
        benchmark.show(result)
