"""What headers of safetensors shards say: names, types and shapes of tensors, none of them read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from spikellm.core.errors import CheckpointError


class StoredTensor(NamedTuple):
    """A tensor as a header has it; types are named as there (``F32``, ``U8``)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Shards(NamedTuple):
    """Tensors of one or several shards by name, and the bytes of their files."""

    tensors: dict[str, StoredTensor]
    bytes: int

    @property
    def elements(self) -> int:
        """How many numbers they hold."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, str]:
        """Types of tensors by name."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}


_KNOWN: ContextVar[dict[Path, Shards] | None] = ContextVar("headers", default=None)


@contextmanager
def headers_read_once() -> Iterator[None]:
    """While this holds, the header of a shard is read when it is first asked for and remembered."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def read_headers(paths: Iterable[Path]) -> Shards:
    """What shards hold together.

    Raises:
        CheckpointError: one is missing, damaged or not of the length that its header declares.
    """
    known = _KNOWN.get()
    tensors, size = dict[str, StoredTensor](), 0
    for path in map(Path.resolve, paths):
        found = _read(path) if known is None or path not in known else known[path]
        if known is not None:
            known[path] = found
        tensors |= found.tensors
        size += found.bytes
    return Shards(tensors, size)


def _read(path: Path) -> Shards:
    if not path.is_file():
        raise CheckpointError(
            f"shard {path} is missing though the index names it; copy it there again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            tensors = {
                name: StoredTensor(one.get_dtype(), tuple(one.get_shape()))
                for name, one in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"shard {path} is truncated or damaged ({' '.join(str(error).split())[:300]}); copy it"
            " again"
        ) from None
    return Shards(tensors, path.stat().st_size)
