"""What is told of a conversion, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.algorithms import FittedBlock
from spikellm.conversion.record_schema import MOST_ERROR, wrong_in_block
from spikellm.core import distributed
from spikellm.core.errors import NumericalError
from spikellm.nn.rotation import rotation_of


@dataclass(frozen=True)
class BlockRecord:
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

    name: str
    loss: float
    relative_loss: float
    layers: list[str]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rotated: dict[str, int] = field(default_factory=dict)


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
        name,
        squared / count,
        min(squared / max(power, 1e-300), MOST_ERROR),
        list(modules),
        fitted.dropped,
        fitted.notes,
        fitted.rotated,
    )


def record_from(data: Any, name: str, modules: Mapping[str, nn.Module]) -> BlockRecord:
    """The record of a block of this name and these modules, from plain data that may be anything.

    Raises:
        ValueError: it is not the record of that block; says in what.
    """
    if problem := wrong_in_block(data):
        raise ValueError(problem)
    rotated = {rotation_of(key) for key in data.get("rotated", ())}
    if (
        data["name"] != name
        or sorted(data["layers"]) != sorted(modules)
        or not rotated <= modules.keys()
    ):
        raise ValueError(
            f"it holds the record of {data['name'][:80]!r}, of {len(data['layers'])} modules,"
            f" expected {name}, of {len(modules)}"
        )
    return BlockRecord(**data)
