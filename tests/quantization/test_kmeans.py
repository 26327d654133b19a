"""k-means that is the same in every run."""

from __future__ import annotations

import torch

from spikellm.quantization.kmeans import k_means


def test_points_that_lie_apart_are_told_apart_and_numbered_by_size() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[9.0, -9.0], [0.0, 0.0], [3.0, -1.0]])
    owner = torch.randint(0, 3, (60,), generator=generator)
    points = centers[owner] + 0.1 * torch.randn(60, 2, generator=generator)
    by_norm = torch.tensor([2, 0, 1])
    for seed in range(5):
        assert torch.equal(k_means(points, 3, seed), by_norm[owner])


def test_the_same_seed_gives_the_same_clusters() -> None:
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    first, again = k_means(points, 8, 3), k_means(points.clone(), 8, 3)
    assert torch.equal(first, again)
    assert set(first.tolist()) == set(range(8))


def test_it_is_a_minimum_of_its_kind() -> None:
    """No point is nearer to another cluster's mean."""
    points = torch.randn(100, 2, generator=torch.Generator().manual_seed(2)).double()
    owner = k_means(points, 6, 0)
    means = torch.stack([points[owner == one].mean(0) for one in range(6)])
    distance = torch.cdist(points, means)
    own = distance.gather(1, owner.unsqueeze(1)).squeeze(1)
    assert bool((own <= distance.amin(1) + 1e-12).all())


def test_fewer_points_than_clusters() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert k_means(points, 5, 0).tolist() == [0, 0, 1]
    assert k_means(points[:1], 3, 0).tolist() == [0]
