"""Cached rows of massive tokens, which are too wide for the rows of a cache. See
:mod:`spikellm.nn.massive_heads`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WideRows:
    """Wide rows of one part of a layer's cache, uint8 ``(rows, bytes)``, in the order in which they
    came. They stay until the cache is reset.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def append(self, rows: Tensor) -> Tensor:
        """Add rows, ``(rows, bytes)``; gives their numbers, int64 ``(rows,)``."""
        first = 0 if self.rows is None else len(self.rows)
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows])
        return torch.arange(first, first + len(rows), device=rows.device)


class MassiveValues(NamedTuple):
    """Cached massive tokens.

    Attributes:
        places: batch, head and token of each, int64 ``(rows, 3)``.
        values: float32 ``(rows, channels)``.
    """

    places: Tensor
    values: Tensor
