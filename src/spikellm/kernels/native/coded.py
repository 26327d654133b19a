"""What a tensor was last coded to, for the other layers that read the very same tensor: query, key
and value; gate and up.

A write that torch does not count (through ``.data``, numpy or another library) is not seen between
two different layers of one pass. The same layer never takes what was left twice, so a buffer that
is filled anew for every pass is coded anew.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Coded(NamedTuple):
    """What a tensor was coded to.

    Attributes:
        memory: as kernels read it.
        shown: codes and baselines for whoever observes, see
            :class:`spikellm.kernels.prepared.Observed`; None where nobody did.
    """

    memory: Tensor
    shown: tuple[Tensor, Tensor] | None = None


class _Source(NamedTuple):
    """A tensor as it was, but for its values."""

    version: int
    address: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> _Source:
        return cls(x._version, x.data_ptr(), x.shape, x.dtype)


class _Kept:
    def __init__(self, x: Tensor, coding: bytes, coded: Coded) -> None:
        self.source, self.coding = _Source.of(x), coding
        self.coded: Coded | None = coded
        self.users: set[int] = set()  # layers that had it
        own = weakref.ref(self)  # no cycle, which would keep the memory

        def forget(_: object) -> None:
            kept = own()
            if kept is not None:
                kept.coded = None

        self.tensor = weakref.ref(x, forget)


class LastCoded(threading.local):
    """The last tensor that this thread coded; forgotten when the tensor goes, or is written to."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def of(self, x: Tensor, coding: bytes, layer: object, shown: bool = False) -> Coded | None:
        """What a tensor was coded to by another layer that codes alike; None if that was not the
        last, if ``layer`` had it before, or if codes are to be ``shown`` and were not.
        """
        kept = self._kept
        if kept is None or kept.tensor() is not x or kept.coding != coding:
            return None
        if kept.source != _Source.of(x) or id(layer) in kept.users:
            return None
        if kept.coded is None or (shown and kept.coded.shown is None):
            return None
        kept.users.add(id(layer))
        return kept.coded

    def keep(self, x: Tensor, coding: bytes, layer: object, coded: Coded) -> None:
        """Leave what a tensor was coded to for other layers."""
        before, self._kept = self._kept, _Kept(x, coding, coded)
        self._kept.users.add(id(layer))
        if before is not None and before.tensor() is x and before.coding == coding:
            self._kept.users |= before.users  # had it, before codes were to be shown


last_coded = LastCoded()
