"""Parameters that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from spikellm.commands.support.verb import Argument, Option

Model = Annotated[
    str,
    Argument(
        "Folder, GGUF file or hub name of a model, converted or not.", "MODEL", reads="models"
    ),
]
Device = Annotated[
    str | None,
    Option("Where to run, for example cpu or cuda:0.", filled="a device, for example cpu"),
]
Trust = Annotated[bool, Option("Run Python code that comes with the model.")]
Settings = Annotated[
    tuple[str, ...],
    Option(
        "Change a recipe field, for example weights.bits=3. May be repeated.",
        "KEY=VALUE",
        name="set",
        reads="settings",
    ),
]
Calibration = Annotated[
    str | None,
    Option(
        "wikitext2, c4, ptb (hub), stdlib (built in), a .txt, .jsonl or .json file, or a folder.",
        "NAME|PATH",
        reads="texts",
    ),
]
EnergyTable = Annotated[
    str | None,
    Option(
        "Energies per operation; horowitz-45nm by default.",
        "NAME|FILE",
        filled="a table's name or file",
        reads="files",
    ),
]
Texts = Annotated[
    tuple[str, ...],
    Option("Text to measure on. May be repeated.", "NAME|PATH", reads="texts"),
]
IN_MODES = "Sum spikes merged (default), stepped, binary or in phases; the result is the same."
MODES_FILLED = "merged, stepped, binary or phase"
Execution = Annotated[str | None, Option(IN_MODES, filled=MODES_FILLED)]
Samples = Annotated[int | None, Option("Windows of calibration text.")]
Seqlen = Annotated[
    int | None, Option("Tokens of a window; min(2048, the model's maximum) by default.")
]
BosChoice = Annotated[
    str,
    Option(
        "Start every window with the BOS token: always, never, or auto (default), where the"
        " tokenizer adds one by itself.",
        "auto|always|never",
    ),
]

Visitor = Callable[[str, Any, Any], dict[str, Any]]
"""Called with name, model and tokenizer of what is measured; what it returns joins the row."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        device: where it runs; where the model library puts it by default.
        trust_remote_code: run Python code that comes with the model.
    """

    device: Device = None
    trust_remote_code: Trust = False


@dataclass(frozen=True, kw_only=True)
class GridOptions(LoadOptions):
    """How the rows of a table are converted and measured.

    Attributes:
        calibration, samples, seqlen: replace the recipes' own; ``seqlen`` is of the texts too.
        seeds: one conversion for each; the mean and the standard deviation are given. The recipe's
            own seed by default.
        limit: use the first windows of each text only.
        bos: of the windows that are measured on; those of calibration are as the recipe says.
        energy_table: see :func:`spikellm.profiling.energy_table.load_table`.
    """

    calibration: Calibration = None
    samples: Samples = None
    seqlen: Seqlen = None
    seeds: Annotated[
        tuple[int, ...],
        Option("Convert once for each; mean and deviation.", "1,2,…", separated=True),
    ] = ()
    limit: Annotated[int | None, Option("Use the first N windows only.")] = None
    bos: BosChoice = "auto"
    energy_table: EnergyTable = None


@dataclass(frozen=True, kw_only=True)
class FolderOptions(LoadOptions):
    """How a conversion to a folder is run; nothing here decides its result.

    Attributes:
        resume: go on with an interrupted conversion, or start one.
        store: where hidden states of the calibration text are kept: ``ram``, ``disk`` (beside OUT),
            or ``auto``, by what is free.
        force: overwrite the model in OUT, and forget an interrupted conversion to it.
    """

    resume: Annotated[
        bool, Option("Go on with an interrupted conversion to OUT, or start one.")
    ] = False
    store: Annotated[
        str,
        Option(
            "Keep hidden states of the calibration text in ram or on disk; auto: by what is free."
        ),
    ] = "auto"
    force: Annotated[
        bool,
        Option("Overwrite the model in OUT, and forget an interrupted conversion to it."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainFolderOptions(LoadOptions):
    """What training goes by, and how it is run.

    Attributes:
        resume: go on with an interrupted training, or start one.
        force: overwrite the model in OUT, and forget an interrupted training to it.
    """

    original: Annotated[
        str | None,
        Option(
            "Folder, GGUF file or hub name of the model that was converted; needed, since a"
            " converted folder does not say where it came from.",
            "MODEL",
            reads="models",
            filled="a folder or hub name",
        ),
    ] = None
    calibration: Calibration = None
    steps: Annotated[int | None, Option("Updates.")] = None
    settings: Settings = ()
    resume: Annotated[bool, Option("Go on with an interrupted training to OUT, or start one.")] = (
        False
    )
    force: Annotated[
        bool, Option("Overwrite the model in OUT, and forget an interrupted training to it.")
    ] = False
