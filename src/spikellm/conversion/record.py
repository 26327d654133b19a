"""What is told of a conversion, as frozen models of plain data.

Blocks are recorded one by one in the journal and together in ``config.json``; the journal's
manifest says what decides the bytes. All of them are read from files that may hold anything, so
their types and bounds are exact.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError
from torch import Tensor, nn

from spikellm.algorithms import FittedBlock
from spikellm.core import distributed
from spikellm.core.errors import NumericalError
from spikellm.nn.rotation import rotation_of

MOST_ERROR = 1e300  # a mean square, absolute or relative


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("Input should be one line of printable text")
    return text


Line = Annotated[str, AfterValidator(_printable)]
Lines = Annotated[list[Line], FailFast()]
Count = Annotated[int, Field(ge=0, lt=2**40)]
Loss = Annotated[float, Field(ge=-MOST_ERROR, le=MOST_ERROR)]
MeanSquare = Annotated[float, Field(ge=0, le=MOST_ERROR)]  # NaN is none


class _Record(BaseModel):
    """Frozen; nothing is converted, so that what is written again is what was read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class BlockRecord(_Record):
    """What converting one block did.

    Attributes:
        name: full name of the block.
        loss: mean squared difference of the two streams behind it.
        relative_loss: that over the mean square of the full-precision stream.
        layers: full names of the modules converted.
        dropped: equivalent transforms that do not hold here.
        notes: what a user should know of how the fit went.
        rotated: how many input channels are rotated while the model runs, by layer.
    """

    name: Line
    loss: MeanSquare
    relative_loss: MeanSquare
    layers: Lines
    dropped: Lines = []
    notes: Lines = []
    rotated: dict[Line, Count] = {}


class CalibrationRecord(_Record, extra="ignore"):
    """The calibration text.

    Attributes:
        windows, seqlen: how many windows of how many tokens.
        sha256: of the windows.
        bos: whether every window starts with the BOS token.
        notes: what a user should know of it.
    """

    windows: Count
    seqlen: Count
    sha256: Line
    bos: bool = False
    notes: Lines = []


class CheckRecord(_Record):
    """The loss on what is held out, per token in nats, after an update."""

    update: Count
    loss: Loss


class TrainingRecord(_Record, extra="ignore"):
    """What training after conversion did.

    Attributes:
        trained: how many numbers were trained.
        tokens: tokens of an update.
        losses: of the updates, in order, per token in nats.
        checks: losses on the windows that were held out, from update 0 on.
        best: the update whose state was kept.
        sha256: of the windows that were trained on.
        notes: what a user should know of how it went.
    """

    trained: Count
    tokens: Count
    losses: Annotated[list[Loss], FailFast()]
    checks: Annotated[list[CheckRecord], FailFast()]
    best: Count
    sha256: Line
    notes: Lines = []


class ConversionRecord(_Record, extra="ignore"):
    """What a whole conversion did.

    Attributes:
        blocks: one record a block, then one of the output projection if it was converted.
        versions: versions of packages that decide the bytes, by package.
        model: fingerprint of the original.
        parameters: how many numbers the original had, tied ones once; 0 where nobody counted.
        device: kind of device it was converted on.
        notes: what a user should know of the whole.
        training: what training after conversion did, where there was any.
    """

    blocks: Annotated[list[BlockRecord], FailFast()]
    calibration: CalibrationRecord
    versions: dict[Line, Line]
    model: Line = ""
    parameters: Count = 0
    device: Line = ""
    notes: Lines = []
    training: TrainingRecord | None = None


class Manifest(_Record):
    """What decides the bytes of a conversion: equal manifests, equal bytes.

    Attributes:
        recipe: the whole recipe, as plain data.
        text: SHA-256 of the calibration windows.
        versions: versions of packages that decide the bytes, by package.
        model: fingerprint of the original.
        device: kind of device.
    """

    recipe: dict[str, Any]
    text: Line
    versions: dict[Line, Line]
    model: Line
    device: Line


def explain(error: ValidationError) -> str:
    """The first problem of a record that is not valid, in one line, such as
    ``loss: Input should be a valid number, found None``.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"])) or "the whole"
    place = place if place.isprintable() and len(place) <= 80 else reprlib.repr(place)
    problem = first["msg"].removeprefix("Value error, ")
    return f"{place}: {problem}, found {reprlib.repr(first['input'])}"


@dataclass(frozen=True)
class Progress:
    """Where the loop stands: for people, never saved."""

    index: int
    total: int
    record: BlockRecord
    seconds: float
    peak_memory: int
    resumed: bool


OnBlock = Callable[[Progress], None]


def record_of(
    name: str,
    modules: Mapping[str, nn.Module],
    pairs: Iterable[tuple[Tensor, Tensor]],
    fitted: FittedBlock,
) -> BlockRecord:
    """Difference of the two streams, from pairs of converted and exact states.

    Of several ranks over all of them.
    """
    squared, power, count = 0.0, 0.0, 0
    for converted, exact in pairs:
        target = exact.double()
        squared += float((converted.double() - target).square().sum())
        power += float(target.square().sum())
        count += target.numel()
    squared, power, count = distributed.all_reduce(
        torch.tensor([squared, power, count], dtype=torch.float64)
    ).tolist()
    if not math.isfinite(squared):
        raise NumericalError(
            f"the converted model gives NaN or infinity behind {name}; raise bits or leave its"
            " layers out with an override"
        )
    return BlockRecord(
        name=name,
        loss=min(squared / count, MOST_ERROR),
        relative_loss=min(squared / max(power, 1e-300), MOST_ERROR),
        layers=list(modules),
        dropped=fitted.dropped,
        notes=fitted.notes,
        rotated=fitted.rotated,
    )


def record_from(data: Any, name: str, modules: Mapping[str, nn.Module]) -> BlockRecord:
    """The record of a block of this name and these modules, from plain data that may be anything.

    Raises:
        ValueError: it is not the record of that block; says in what.
    """
    try:
        record = BlockRecord.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"record of a block: {explain(error)}") from None
    rotated = {rotation_of(key) for key in record.rotated}
    if (
        record.name != name
        or sorted(record.layers) != sorted(modules)
        or not rotated <= modules.keys()
    ):
        raise ValueError(
            f"it holds the record of {record.name[:80]!r}, of {len(record.layers)} modules,"
            f" expected {name}, of {len(modules)}"
        )
    return record
