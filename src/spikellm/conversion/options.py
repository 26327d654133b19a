"""How a conversion runs: where, from which journal, who is told. None of it changes the result but
the kind of device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from spikellm.conversion.estimate import Needs
from spikellm.conversion.journal import Journal
from spikellm.conversion.record import OnBlock, Progress
from spikellm.observers.activation_store import SharedStream

OnStage = Callable[[str], object]
Store = Callable[[Needs], Path | None] | str | Path | None


class ConvertOptions(TypedDict, total=False):
    """Keywords of :func:`spikellm.convert`, as it describes them."""

    samples: int | None
    seqlen: int | None
    seed: int | None
    settings: Iterable[str]
    device: str | torch.device | None
    journal: str | Path | None
    on_block: OnBlock | None
    on_stage: OnStage | None
    shared: SharedStream | None
    store: Store
    replaces: bool
    original: Any
    on_step: Callable[[Any], object] | None
    trust_remote_code: bool


@dataclass(frozen=True)
class RunOptions:
    """How a conversion runs.

    Attributes:
        device: where blocks are converted; each goes there and back.
        journal: where finished blocks are kept, to resume from.
        on_block: called after every block, and after the output projection.
        on_stage: called with a few words before each step that takes a while.
        shared: where the full-precision stream is kept for the next conversion of the same model.
        store: folder to keep hidden states in, instead of RAM; or a function that is told what is
            needed and returns one.
    """

    device: torch.device
    journal: Journal | None
    on_block: OnBlock
    on_stage: OnStage
    shared: SharedStream | None
    store: Store

    @classmethod
    def of(
        cls, options: ConvertOptions, device: torch.device, identity: dict[str, Any]
    ) -> RunOptions:
        """From keywords; ``identity`` is the journal's.

        Raises:
            RequestError: the journal is of another conversion.
        """
        journal, replaces = options.get("journal"), options.get("replaces", False)
        return cls(
            device,
            None if journal is None else Journal(Path(journal), identity, replaces=replaces),
            options.get("on_block") or _say_nothing,
            options.get("on_stage") or _say_nothing,
            options.get("shared"),
            options.get("store"),
        )


def _say_nothing(_: Progress | str) -> None:
    pass
