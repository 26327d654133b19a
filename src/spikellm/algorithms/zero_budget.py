"""How many weights of each layer are zero, from one number for all layers: those go whose loss is
least, wherever they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spikellm.algorithms.step_budget import WeighedLayer

_SAMPLED = 1 << 16  # weights of a layer, evenly spread, that stand for all


def share_zeros(layers: Sequence[WeighedLayer], share: float) -> dict[str, float]:
    """Share of the weights of each layer that are zero, ``round(share · weights)`` in all.

    A weight costs its square times what an error in its column costs under error feedback and what
    an error in its row costs the loss (Fisher information): what steps of ternary weights are spent
    by too.
    """
    samples, sizes = [], []
    for layer in layers:
        losses = layer.zero_losses().flatten()
        stride = -(-len(losses) // _SAMPLED)
        samples.append(losses[::stride].cpu().sort().values)
        sizes.append(len(losses))
    whole = round(share * sum(sizes))
    each = torch.cat(
        [
            torch.full_like(sample, size / len(sample), dtype=torch.float64)
            for sample, size in zip(samples, sizes, strict=True)
        ]
    )
    losses, order = torch.cat(samples).sort(stable=True)
    edge = losses[int((each[order].cumsum(0) < whole).sum().clamp(max=len(losses) - 1))]
    counts = [
        round(float(torch.searchsorted(sample, edge)) / len(sample) * size)
        for sample, size in zip(samples, sizes, strict=True)
    ]
    left = whole - sum(counts)  # of samples, and of what equals the edge
    for place in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        added = min(max(left, -counts[place]), sizes[place] - counts[place])
        counts[place] += added
        left -= added
    return {
        layer.layer.name: count / size
        for layer, count, size in zip(layers, counts, sizes, strict=True)
    }
