"""The command ``spikellm convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Calibration, Device, Json, Model, Samples, Seqlen, Set, Trust
from spikellm.commands.inputs import sources
from spikellm.core import console


@app.command()
def convert(
    model: Model,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; appears once it is complete.")
    ],
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="Name of a preset (see `spikellm recipes`) or a YAML file."),
    ] = "w4a4-t2",
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Decides windows and random controls.")
    ] = None,
    device: Device = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted conversion to OUT, or start one."),
    ] = False,
    store: Annotated[
        str,
        typer.Option(
            "--store",
            help=(
                "Keep hidden states of the calibration text in ram or on disk; auto: by what is"
                " free."
            ),
        ),
    ] = "auto",
    settings: Set = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Overwrite the model in OUT, and forget an interrupted conversion to it.",
        ),
    ] = False,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a model to spikes and save it.

    Examples:

      spikellm convert ./model out/w4a4 --recipe w4a4-t2 --calibration text.txt

      torchrun --nproc-per-node 4 -m spikellm convert ./model out/gptq --recipe gptq-w4a16
      --calibration text.txt

      spikellm convert organisation/model out/w8a8 --recipe w8a8 --samples 64 --set
      weights.group_size=128
    """
    console.check_json_target(
        json,
        sources(models=[model], texts=[calibration], recipes=[recipe], settings=settings or ()),
        {"OUT": out},
    )
    from spikellm.commands.convert import convert_to_folder
    from spikellm.core import distributed

    with distributed.process_group():
        console.speak(distributed.is_main())
        result = convert_to_folder(
            model,
            out,
            recipe,
            calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            device=device,
            resume=resume,
            settings=settings or (),
            overwrite=force,
            store=store,
            trust_remote_code=trust_remote_code,
        )
        if not distributed.is_main():
            return
    if json:
        console.write_json(result, json)
    if json != "-":
        print(
            f"{out}: {result['layers']} spiking layers, {result['average_steps']:.3f} steps on"
            f" average, weights at {result['weight_ratio']:.3f} of 16 bits"
        )
