"""The verb ``convert``: a model from a folder or the hub into a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from spikellm.commands.support.options import (
    Calibration,
    FolderOptions,
    Model,
    Samples,
    Seqlen,
    Settings,
)
from spikellm.commands.support.verb import Argument, Option, verbs
from spikellm.core import console


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(FolderOptions):
    """The recipe with what replaces its own values, and how the conversion is run."""

    recipe: Annotated[
        str,
        Option("Name of a preset (see `spikellm recipes`) or a YAML file.", reads="recipes"),
    ] = "w4a4-t2"
    calibration: Calibration = None
    samples: Samples = None
    seqlen: Seqlen = None
    seed: Annotated[int | None, Option("Decides windows and random controls.")] = None
    settings: Settings = ()


_DEFAULT = ConvertOptions()


@verbs.register("convert")
def convert(
    model: Model,
    out: Annotated[
        Path, Argument("Folder to write; appears once it is complete.", "OUT", writes="folder")
    ],
    options: ConvertOptions = _DEFAULT,
) -> dict[str, Any] | None:
    """Convert a model to spikes and save it.

    Finished blocks are kept beside OUT until all is done.

    Examples:

      spikellm convert ./model out/w4a4 --recipe w4a4-t2 --calibration text.txt

      torchrun --nproc-per-node 4 -m spikellm convert ./model out/gptq --recipe gptq-w4a16
      --calibration text.txt

      spikellm convert organisation/model out/w8a8 --recipe w8a8 --samples 64 --set
      weights.group_size=128

    Returns:
        ``{"out", "recipe", "layers", "dense", "average_steps", "attention", "weight_ratio",
        "blocks"}``; None on all ranks but the first.

    Raises:
        RequestError: OUT holds what is read; it is not empty, and no model to overwrite; another
            process writes it; or an interrupted conversion lies beside it and neither ``resume``
            nor ``force`` says what to do.
    """
    from spikellm import api
    from spikellm.commands.support.conversion import FolderConversion
    from spikellm.core import distributed

    with distributed.process_group():
        console.speak(distributed.is_main())
        recipe = api.resolve_recipe(
            options.recipe,
            options.calibration,
            options.samples,
            options.seqlen,
            options.seed,
            options.settings,
        )  # before anything slow
        reads = (model, recipe.calibration.text, options.recipe)
        result = FolderConversion(model, out, recipe, options).run(reads)
        return result if distributed.is_main() else None


def show(result: dict[str, Any], out: Path) -> None:
    """Print what came of it in a line."""
    print(
        f"{out}: {result['layers']} spiking layers, {result['average_steps']:.3f} steps on"
        f" average, weights at {result['weight_ratio']:.3f} of 16 bits"
    )
