"""Moments of Q and K of an attention module, over all tokens, by key-value head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikellm.core import distributed
from spikellm.models.attention_interface import Observation


@dataclass
class HeadMoments:
    """Sums, float64, as attention multiplies what it is fed.

    A key counts as much as it is attended to: an error of a key that no query looks at changes
    nothing, and the sink, a single token, often gets most of all attention.

    Attributes:
        mass: attention that keys received, ``(heads,)``.
        key: keys times their mass, ``(heads, channels)``.
        keys: ``k kᵀ`` times their mass, ``(heads, channels, channels)``.
        queries: ``q qᵀ`` of all query heads that share a key head, of the same shape.
        asked: how many queries.
    """

    mass: Tensor | float = 0.0
    key: Tensor | float = 0.0
    keys: Tensor | float = 0.0
    queries: Tensor | float = 0.0
    asked: Tensor | float = 0.0

    def update(self, seen: Observation) -> None:
        """Take one pass through the module."""
        heads = seen.key.shape[1]
        received = (
            seen.weights.float().sum(2).unflatten(1, (heads, -1)).sum(2)
        )  # (batch, heads, keys)
        key = seen.key.float()
        query = seen.query.float().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
        weighed = key * received.unsqueeze(-1)
        self.mass = self.mass + received.sum((0, 2)).double()
        self.key = self.key + weighed.sum((0, 2)).double()
        self.keys = self.keys + torch.einsum("bhtc,bhtd->hcd", weighed, key).double()
        self.queries = self.queries + (query.transpose(1, 2) @ query).double()
        self.asked = self.asked + torch.tensor([float(query.shape[1])], dtype=torch.float64)

    def all_reduce(self) -> None:
        """Take over what other ranks saw."""
        for name in ("mass", "key", "keys", "queries", "asked"):
            total = getattr(self, name)
            assert isinstance(total, Tensor)
            distributed.all_reduce(total)

    def center(self) -> Tensor:
        """The mean of K, as it is attended to, ``(heads, channels)``."""
        assert isinstance(self.key, Tensor)
        assert isinstance(self.mass, Tensor)
        return self.key / self.mass.unsqueeze(1)

    def spread(self, center: Tensor | None) -> Tensor:
        """Second moments of K around a center, ``(heads, channels, channels)``."""
        assert isinstance(self.keys, Tensor)
        assert isinstance(self.mass, Tensor)
        moments = self.keys / self.mass[:, None, None]
        if center is None:
            return moments
        mean, away = self.center(), center.double()
        cross = torch.einsum("hc,hd->hcd", mean, away)
        return moments - cross - cross.transpose(1, 2) + torch.einsum("hc,hd->hcd", away, away)

    def asking(self) -> Tensor:
        """Second moments of Q, ``(heads, channels, channels)``."""
        assert isinstance(self.queries, Tensor)
        assert isinstance(self.asked, Tensor)
        return self.queries / self.asked
