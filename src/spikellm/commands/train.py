"""The verb ``train``: a converted model, trained with its spikes in the loop, into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from spikellm.commands.support.options import Model, TrainFolderOptions
from spikellm.commands.support.verb import Argument, verbs
from spikellm.core import console

_DEFAULT = TrainFolderOptions()


@verbs.register("train")
def train(
    model: Model,
    out: Annotated[
        Path, Argument("Folder to write; appears once it is complete.", "OUT", writes="folder")
    ],
    options: TrainFolderOptions = _DEFAULT,
) -> dict[str, Any] | None:
    """Train a converted model with its spikes in the loop and save it.

    Its integers stay as they are; scales, thresholds and gains of norms move. The state is kept
    beside OUT until all is done.

    Examples:

      spikellm train out/best out/trained --original ./model --calibration text.txt --steps 100

      spikellm train out/best out/trained --set training.rate=0.001 --set training.biases=true

      torchrun --nproc-per-node 2 -m spikellm train out/best out/trained --calibration text.txt

    Returns:
        ``{"out", "recipe", "steps", "trained", "held_out": {"before", "after"}, "best", "notes"}``;
        None on all ranks but the first.

    Raises:
        RequestError: the model is not converted, or was trained; the original is another model; OUT
            holds what is read, or is not empty and no model to overwrite; or an interrupted
            training lies beside it and neither ``resume`` nor ``force`` says what to do.
    """
    from spikellm.commands.support.training import FolderTraining
    from spikellm.core import distributed

    with distributed.process_group():
        console.speak(distributed.is_main())
        result = FolderTraining(model, out, options).run()
        return result if distributed.is_main() else None


def show(result: dict[str, Any], out: Path) -> None:
    """Print what came of it in a line."""
    before, after = result["held_out"]["before"], result["held_out"]["after"]
    held = "" if before is None else f", loss held out {before:.4f} to {after:.4f}"
    print(
        f"{out}: {result['trained']:,} numbers trained in {result['steps']} updates{held}; state of"
        f" update {result['best']} kept"
    )
