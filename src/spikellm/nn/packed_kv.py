"""Cached keys and values as packed rows, on their way from a cache to attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.prepared import PreparedHeads
from spikellm.nn.wide_rows import MassiveValues


class PackedKV(NamedTuple):
    """Cached keys or values of one layer, which are never unpacked as a whole.

    Attributes:
        rows: uint8 ``(batch, key-value heads, tokens, row bytes)``.
        kernels: of their coder.
        channels: of a head.
        massive: tokens whose rows only name what they hold; None where there are none.
    """

    rows: Tensor
    kernels: PreparedHeads
    channels: int
    massive: MassiveValues | None = None

    def scores(self, query: Tensor) -> Tensor:
        """``query @ keys.T`` of decoded keys, for ``(batch, heads, queries, channels)``, heads
        sharing keys included.
        """
        scores = self.kernels.key_scores(query, self.rows)
        if self.massive is not None:
            (batch, head, token), values = self.massive.places.unbind(1), self.massive.values
            own = self._by_head(query)[batch, head]  # (massive, shared, queries, channels)
            found = (own @ values[:, None, :, None]).squeeze(-1)
            self._by_head(scores)[batch, head, :, :, token] = found
        return scores

    def sums(self, weights: Tensor) -> Tensor:
        """``weights @ values`` of decoded values, for ``(batch, heads, queries, tokens)``."""
        if self.massive is None:
            return self.kernels.value_sums(weights, self.rows)
        (batch, head, token), values = self.massive.places.unbind(1), self.massive.values
        weights = weights.clone()
        own = self._by_head(weights)[batch, head, :, :, token]  # (massive, shared, queries)
        self._by_head(weights)[batch, head, :, :, token] = 0
        sums = self.kernels.value_sums(weights, self.rows)
        found = own.unsqueeze(-1) * values[:, None, None]
        self._by_head(sums).index_put_((batch, head), found, accumulate=True)
        return sums

    def _by_head(self, x: Tensor) -> Tensor:
        """``(batch, heads, …)`` seen as ``(batch, key-value heads, shared, …)``."""
        return x.view(x.shape[0], self.rows.shape[1], -1, *x.shape[2:])

    def placeholder(self) -> Tensor:
        """What the model hands from the cache to attention: a tensor of the right shape without
        memory of its own, NaN to whoever computes with it.
        """
        nothing = torch.full((), torch.nan, device=self.rows.device)
        x = nothing.expand(*self.rows.shape[:3], self.channels)
        x.spikellm_rows = self  # type: ignore[attr-defined]
        return x


def rows_of(x: Tensor) -> PackedKV | None:
    """Rows that a placeholder stands for; None of a tensor that is what it looks like."""
    return getattr(x, "spikellm_rows", None)
