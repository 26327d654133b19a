"""State of a training on disk, from which an interrupted one goes on to the same bytes."""

from __future__ import annotations

import json
import time
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spikellm.conversion.journal import Journal
from spikellm.core import distributed
from spikellm.core.errors import CheckpointError
from spikellm.core.files import write_atomically
from spikellm.core.io import parse_json

_FILE = "training.safetensors"


class TrainingJournal:
    """The state in the folder of a journal, written by the first rank.

    Args:
        journal: of the conversion, or of this training alone; it compares what decides the bytes.
        every: seconds between two writes.
    """

    def __init__(self, journal: Journal, every: float) -> None:
        self._journal, self._every = journal, every
        self._path, self._last = journal.folder / _FILE, time.monotonic()

    def is_due(self) -> bool:
        """Whether the state is to be written now, as the first rank decides for all."""
        due = distributed.is_main() and time.monotonic() - self._last >= self._every
        return bool(distributed.sum_scalar(float(due)))

    def write(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the state: tensors, and plain data beside them."""
        if distributed.is_main():
            self._journal.begin()
            held = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            write_atomically(
                self._path,
                lambda path: save_file(held, path, metadata={"facts": json.dumps(facts)}),
            )
        self._last = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state; None where there is none yet.

        Raises:
            CheckpointError: it is damaged.
        """
        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in list(file.keys())}
                return tensors, dict(parse_json(file.metadata()["facts"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise self.damaged(error) from None

    def damaged(self, error: Exception) -> CheckpointError:
        """What to say of a state that cannot be used."""
        problem = " ".join(str(error).split())[:200]
        return CheckpointError(
            f"{self._path} is damaged ({problem}); delete it to train again from the start"
        )
