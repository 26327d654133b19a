"""Cached keys and values as packed rows, on their way from a cache to attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.base import PreparedHeads


class PackedKV(NamedTuple):
    """Cached keys or values of one layer, which are never unpacked as a whole.

    Attributes:
        rows: uint8 ``(batch, key-value heads, tokens, row bytes)``.
        kernels: of their coder.
        channels: of a head.
    """

    rows: Tensor
    kernels: PreparedHeads
    channels: int

    def scores(self, query: Tensor) -> Tensor:
        """``query @ keys.T`` of decoded keys, for ``(batch, heads, queries, channels)``, heads
        sharing keys included.
        """
        return self.kernels.key_scores(query, self.rows)

    def sums(self, weights: Tensor) -> Tensor:
        """``weights @ values`` of decoded values, for ``(batch, heads, queries, tokens)``."""
        return self.kernels.value_sums(weights, self.rows)

    def placeholder(self) -> Tensor:
        """What the model hands from the cache to attention: a tensor of the right shape without
        memory of its own, NaN to whoever computes with it.
        """
        x = _NAN.expand(*self.rows.shape[:3], self.channels)
        x.spikellm_rows = self  # type: ignore[attr-defined]
        return x


_NAN = torch.full((), torch.nan)


def rows_of(x: Tensor) -> PackedKV | None:
    """Rows that a placeholder stands for; None of a tensor that is what it looks like."""
    return getattr(x, "spikellm_rows", None)
