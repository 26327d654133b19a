"""What is kept of activations while a model is converted: the hidden states between blocks, and samples of the inputs of linear layers."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from spikellm.calibration import ranks
from spikellm.files import cannot_write
from spikellm.modeling.residency import page_out


class ActivationStore:
    """Hidden states of one stream, one tensor a batch of windows, in RAM or in a file.

    Args:
        batches: states to begin with; each is asked for once the one before it is kept.
        folder: where to keep them in a file, which is never seen under a name; RAM by default.
    """

    def __init__(self, batches: Iterable[Tensor], folder: Path | None = None) -> None:
        self._folder = folder
        self._batches = [batch.detach().cpu() if folder is None else _in_a_file(batch.detach(), folder) for batch in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:
        return self._batches[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self._folder is None:
            self._batches[index] = value.detach().cpu()
        else:
            self._batches[index].copy_(value.detach())
            page_out(self._batches[index])

    def advance(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Replace the states of every batch by what ``forward`` makes of them."""
        for batch in range(len(self)):
            self[batch] = forward(self[batch])

    def copy(self) -> ActivationStore:
        """A store with the same states, kept in the same way; in RAM tensors are replaced, never changed in place, so nothing is duplicated."""
        return ActivationStore(self._batches, self._folder)

    def to_ram(self) -> ActivationStore:
        """A store in RAM with the same states."""
        return ActivationStore([batch.clone() for batch in self._batches]) if self._folder else self.copy()

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
    """Copy of a tensor that lives in a file; the file's name is gone at once, its space when the tensor is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="states-", dir=folder)
        try:
            _allocate(handle, max(1, batch.numel() * batch.element_size()))
            found = torch.from_file(name, shared=True, size=batch.numel(), dtype=batch.dtype).view(batch.shape)
        finally:
            os.close(handle)
            Path(name).unlink()
    except OSError as error:
        raise cannot_write(folder, error) from None
    found.copy_(batch)
    page_out(found)
    return found


class SharedStream:
    """States of the full-precision stream behind every block, kept in RAM from one conversion of a model to the next on the same windows.

    Args:
        limit: bytes to keep at most; a stream that is larger is computed anew each time.
    """

    def __init__(self, limit: int = 2 << 30) -> None:
        self._limit, self._key, self._behind = limit, "", dict[int, ActivationStore]()

    def open(self, key: str, blocks: int, first: ActivationStore) -> None:
        """Say what stream it is: states of another ``key`` (windows, attention, device) are forgotten."""
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


def stride_of(seen: int, wanted: int) -> int:
    """Every how many of the tokens seen one is kept, so that at most ``wanted`` are."""
    return max(1, -(-seen // wanted))


class TokenSample:
    """Evenly spread sample of the input tokens of a linear layer, float32.

    Args:
        seen: tokens that will pass in all.
        wanted: tokens to keep at most.
        before: tokens of the text that other ranks run, in front of those that pass here.
    """

    def __init__(self, seen: int, wanted: int, before: int = 0) -> None:
        self._stride = stride_of(seen, wanted)
        self._position = before
        self._parts: list[Tensor] = []
        self.hessian: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take what the stride picks from ``(..., channels)``."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        first = -self._position % self._stride
        self._position += tokens.shape[0]
        self._parts.append(tokens[first :: self._stride].float())

    def add_to_hessian(self, x: Tensor) -> None:
        """Add ``xᵀx`` of all tokens of ``(..., channels)``, float64 sums of float32 products of a batch."""
        tokens = x.detach().reshape(-1, x.shape[-1]).float()
        product = (tokens.T @ tokens).double()
        self.hessian = product if self.hessian is None else self.hessian.add_(product)

    def put_together(self) -> None:
        """Take over what other ranks saw."""
        self._parts = [ranks.gathered(self.tokens())]
        if self.hessian is not None:
            ranks.summed(self.hessian)

    def tokens(self) -> Tensor:
        """The sample, ``(tokens, channels)``."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]


class SampledInputs:
    """Token samples of several linear layers; layers that are fed the very same tensor (q, k and v) share one sample."""

    def __init__(self, layers: dict[str, nn.Module], seen: int, wanted: int, *, hessian: bool = False, before: int = 0) -> None:
        self._layers, self._seen, self._wanted, self._hessian, self._before = layers, seen, wanted, hessian, before
        self._of: dict[str, TokenSample] = {}
        self._recent: list[tuple[weakref.ref[Tensor], int, TokenSample]] = []  # tensors that live, as they were when sampled

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name].tokens()

    def get(self, name: str) -> Tensor | None:
        """Sample of a layer, None if it was not watched."""
        return self[name] if name in self._of else None

    def hessian(self, name: str) -> Tensor | None:
        """``XᵀX`` over all tokens that a layer was fed, float64 ``(in, in)``; None if it was not asked for or the layer not watched."""
        return self._of[name].hessian if name in self._of else None

    def readers(self, name: str) -> set[str]:
        """Watched layers that are fed the same tensor as this one, itself included."""
        return {other for other, sample in self._of.items() if sample is self._of[name]}

    def turn(self, name: str) -> int:
        """The place of a layer in the order in which watched layers first ran; behind all of them where it was not watched or did not run."""
        return list(self._of).index(name) if name in self._of else len(self._of)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this holds, every forward pass through the layers is sampled."""
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            self._recent = []
            for handle in handles:
                handle.remove()

    def put_together(self) -> None:
        """Take over what other ranks saw."""
        for sample in dict.fromkeys(self._of.values()):
            sample.put_together()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            self._recent = [entry for entry in self._recent if entry[0]() is not None]
            for tensor, version, sample in self._recent:
                if tensor() is x and version == x._version and self._of.get(name, sample) is sample:
                    self._of[name] = sample
                    return
            sample = self._of.setdefault(name, TokenSample(self._seen, self._wanted, self._before))
            sample.update(x)
            if self._hessian:
                sample.add_to_hessian(x)
            self._recent.append((weakref.ref(x), x._version, sample))

        return record
