"""What a tensor was last coded to, for layers that read the very same tensor: query, key and value;
gate and up.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

from torch import Tensor


class _Kept(NamedTuple):
    source: weakref.ref[Tensor]
    version: int
    coding: bytes
    memory: Tensor


class LastCoded(threading.local):
    """The last tensor that this thread coded; forgotten when the tensor goes, or is written to."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def of(self, x: Tensor, coding: bytes) -> Tensor | None:
        """What a tensor was coded to by a layer that codes alike; None if that was not the last."""
        kept = self._kept
        if kept is None or kept.source() is not x or kept.version != x._version:
            return None
        return kept.memory if kept.coding == coding else None

    def keep(self, x: Tensor, coding: bytes, memory: Tensor) -> None:
        """Leave what a tensor was coded to for the next layer."""
        self._kept = _Kept(weakref.ref(x, self._forget), x._version, coding, memory)

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        kept = self._kept
        if kept is not None and kept.source is source:
            self._kept = None


last_coded = LastCoded()
