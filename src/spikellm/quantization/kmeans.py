"""k-means (Lloyd), the same result on every device and in every run."""

from __future__ import annotations

import torch
from torch import Tensor

_RESTARTS = 10
_ROUNDS = 50


def k_means(points: Tensor, count: int, seed: int) -> Tensor:
    """The cluster of every point: the best of several runs from starts that are drawn far apart
    (k-means++, Arthur and Vassilvitskii 2007).

    Args:
        points: ``(points, features)``, finite.
        count: how many clusters; some stay empty where fewer points differ.
        seed: decides the starts.

    Returns:
        int64 ``(points,)``; clusters are numbered by the norms of their centers, the least first.
    """
    points = points.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(points), dtype=torch.int64), float("inf")
    centers = points[:1]
    for _ in range(_RESTARTS):
        found = _starts(points, count, generator)
        owner, loss = _nearest(points, found)
        for _ in range(_ROUNDS):
            found = _means(points, owner, found)
            before, (owner, loss) = owner, _nearest(points, found)
            if torch.equal(before, owner):
                break
        if loss < least:
            best, least, centers = owner, loss, found
    place = torch.empty(len(centers), dtype=torch.int64)
    ranked = torch.sort(torch.linalg.vector_norm(centers, dim=1), stable=True).indices
    place[ranked] = torch.arange(len(centers))
    return place[best]


def _starts(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points to start from, each drawn by its squared distance from those before it."""
    first = int(torch.randint(len(points), (), generator=generator))
    chosen = [first]
    distance = (points - points[first]).square().sum(1)
    while len(chosen) < count and bool((distance > 0).any()):
        drawn = torch.rand((), dtype=torch.float64, generator=generator) * distance.sum()
        place = int(torch.searchsorted(distance.cumsum(0), drawn, right=True))
        chosen.append(min(place, len(points) - 1))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def _nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, float]:
    """The nearest center of every point, the first of equals, and the sum of squared distances."""
    distance = torch.stack([(points - one).square().sum(1) for one in centers], 1)
    found = distance.min(1)
    return found.indices, float(found.values.sum())


def _means(points: Tensor, owner: Tensor, centers: Tensor) -> Tensor:
    """Centers of clusters; that of an empty one stays."""
    sums = torch.zeros_like(centers).index_add_(0, owner, points)
    counts = torch.bincount(owner, minlength=len(centers)).unsqueeze(1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centers)
