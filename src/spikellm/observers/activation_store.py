"""What is kept of activations while a model is converted: the hidden states between blocks, and
samples of the inputs of linear layers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from spikellm.core.files import cannot_write
from spikellm.core.offload import offload


class ActivationStore:
    """Hidden states of one stream, one tensor a batch of windows, in RAM or in a file.

    Args:
        batches: states to begin with; each is asked for once the one before it is kept.
        folder: where to keep them in a file, which is never seen under a name; RAM by default.
    """

    def __init__(self, batches: Iterable[Tensor], folder: Path | None = None) -> None:
        self._folder = folder
        self._batches = [
            batch.detach().cpu() if folder is None else _in_a_file(batch.detach(), folder)
            for batch in batches
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:
        return self._batches[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self._folder is None:
            self._batches[index] = value.detach().cpu()
        else:
            self._batches[index].copy_(value.detach())
            offload(self._batches[index])

    def advance(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Replace the states of every batch by what ``forward`` makes of them."""
        for batch in range(len(self)):
            self[batch] = forward(self[batch])

    def copy(self) -> ActivationStore:
        """A store with the same states, kept in the same way.

        In RAM tensors are replaced, never changed in place, so nothing is duplicated.
        """
        return ActivationStore(self._batches, self._folder)

    def to_ram(self) -> ActivationStore:
        """A store in RAM with the same states."""
        return (
            ActivationStore([batch.clone() for batch in self._batches])
            if self._folder
            else self.copy()
        )

    @property
    def bytes(self) -> int:
        """Bytes of the states."""
        return sum(batch.numel() * batch.element_size() for batch in self._batches)


def _allocate(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a signal later
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def _in_a_file(batch: Tensor, folder: Path) -> Tensor:
    """Copy of a tensor that lives in a file.

    The file's name is gone at once, its space when the tensor is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="states-", dir=folder)
        try:
            _allocate(handle, max(1, batch.numel() * batch.element_size()))
            found = torch.from_file(name, shared=True, size=batch.numel(), dtype=batch.dtype).view(
                batch.shape
            )
        finally:
            os.close(handle)
            Path(name).unlink()
    except OSError as error:
        raise cannot_write(folder, error) from None
    found.copy_(batch)
    offload(found)
    return found


class SharedStream:
    """States of the full-precision stream behind every block, kept in RAM from one conversion of a
    model to the next on the same windows.

    Args:
        limit: bytes to keep at most; a stream that is larger is computed anew each time.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self._limit, self._key, self._behind = limit, "", dict[int, ActivationStore]()

    def open(self, key: str, blocks: int, first: ActivationStore) -> None:
        """Say what stream it is: states of another ``key`` (windows, attention, device) are
        forgotten.
        """
        if key != self._key:
            self._key, self._behind = key, {}
        self._keeps = blocks * first.bytes <= self._limit

    def behind(self, index: int) -> ActivationStore | None:
        """States behind block ``index``; None if they are not kept."""
        return self._behind.get(index)

    def keep(self, index: int, states: ActivationStore) -> None:
        """Keep the states behind a block, if there is room."""
        if self._keeps:
            self._behind[index] = states.to_ram()
