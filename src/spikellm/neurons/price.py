"""Rounding that weighs loss against spikes: a value goes to the count n that costs least in

    (|u| − |n|)² + λ · spikes(|n|),     u = x / θ

where spikes are |n| of a binary train, or the digits of a phase train that fire. λ is the price of
a spike in squared thresholds. It is an entropy-constrained scalar quantizer (Sullivan 1996, IEEE
Transactions on Information Theory 42(5)) with spikes in the place of bits.

*Binary*: every code is a little dearer than the one before, so all decisions move away from zero
by λ/2. A neuron does so by an inhibiting charge of λ/2 thresholds that comes with its current.

*Phase*: ``f(n) = n² + λ·spikes(n)`` need not be convex, and the codes that are best for some value
are the corners of its lower convex hull. Between two corners n < m lies one decision,
``(f(m) − f(n)) / (2 (m − n))``: a table for all codes. A neuron takes the charge that comes to the
level that is worth its spikes before it is integrated.

A count that is out of reach (beyond the top code) is clipped to the last one that is not.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spikellm.neurons.phase import Recoding, digits_that_fire

SpikeForm = Literal["binary", "phase"]
"""Which spikes are weighed and counted: those of a binary or of a phase train."""

MOST_PRICE = 2.0**20
_CODES = 4096  # of the table; no train reaches more, and it is one for all, whatever their steps
_PRICE_UNIT = 512  # λ/2 and decisions are multiples of 2⁻¹⁰, which float32 holds exactly
_EDGE_UNIT = 1024


class Levels(NamedTuple):
    """Counts that are best for some value, and where the decisions between them lie.

    Attributes:
        edges: float, ``(corners − 1,)``, rising: from ``edges[i]`` thresholds on it is the count
            ``counts[i + 1]``.
        counts: int64, ``(corners,)``, rising from 0.
    """

    edges: Tensor
    counts: Tensor


def whole_price(price: float) -> float:
    """The nearest price that is coded with, a multiple of 1/512.

    Raises:
        ValueError: it is negative, too large or NaN.
    """
    if not 0 <= price <= MOST_PRICE:
        raise ValueError(f"a spike's price is {price:g}, expected 0 to {MOST_PRICE:g}")
    return round(price * _PRICE_UNIT) / _PRICE_UNIT


@lru_cache(maxsize=64)
def spikes_of_counts(form: SpikeForm, recoding: Recoding, most: int = _CODES) -> Tensor:
    """Spikes of the counts ``0 … most``, int64 ``(most + 1,)``; not to be changed."""
    return torch.arange(most + 1) if form == "binary" else digits_that_fire(most, recoding)


def best_levels(price: float, spikes: Tensor) -> Levels:
    """Corners of the lower convex hull of ``n² + λ·spikes(n)``, and decisions between them,
    float64.

    Args:
        spikes: of the counts 0, 1, 2 …, ``(counts,)``.
    """
    cost = [n * n + price * own for n, own in enumerate(spikes.tolist())]
    corners = [0]
    for n in range(1, len(cost)):
        while len(corners) > 1 and _slope(cost, corners[-1], n) <= _slope(cost, *corners[-2:]):
            corners.pop()
        corners.append(n)
    edges = [_slope(cost, low, high) / 2 for low, high in pairwise(corners)]
    return Levels(torch.tensor(edges, dtype=torch.float64), torch.tensor(corners))


def _slope(cost: list[float], low: int, high: int) -> float:
    return (cost[high] - cost[low]) / (high - low)


@lru_cache(maxsize=1024)
def phase_levels(price: float, recoding: Recoding, top: int) -> Levels:
    """Levels of a neuron whose phase spikes have a price, up to the first beyond ``top``; edges are
    float32.
    """
    edges, counts = _all_phase_levels(price, recoding)
    some = int((counts < top).sum())
    return Levels(edges[:some].contiguous(), counts[: some + 1].contiguous())


@lru_cache(maxsize=1024)
def _all_phase_levels(price: float, recoding: Recoding) -> Levels:
    edges, counts = best_levels(price, spikes_of_counts("phase", recoding))
    return Levels(((edges * _EDGE_UNIT).round() / _EDGE_UNIT).float(), counts)


def inhibited(units: Tensor, price: float) -> Tensor:
    """Current in thresholds with λ/2 taken off its magnitude.

    The difference of float32 numbers is exact wherever it decides: it is a multiple of the last bit
    of ``units`` and no larger.
    """
    return (units.abs() - price / 2).clamp(min=0).copysign(units)


def at_levels(units: Tensor, levels: Levels, *, signed: bool) -> Tensor:
    """Current in thresholds, float32, at the level that is worth its spikes: whole numbers.

    Args:
        signed: whether ties of negative values go away from zero, as those of a signed neuron do,
            and not towards it, as rounding up does.
    """
    edges, counts = (one.to(units.device) for one in levels)
    if signed:
        return counts[torch.bucketize(units.abs(), edges, right=True)].float().copysign(units)
    edges = torch.cat([-edges.flip(0), edges])
    counts = torch.cat([-counts[1:].flip(0), counts])
    return counts[torch.bucketize(units.contiguous(), edges, right=True)].float()
