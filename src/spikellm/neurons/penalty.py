"""Spikes as a penalty that training can lower.

How many spikes a value takes is a staircase of its current, thresholds and price, so its gradient
is zero almost everywhere. With noise of one threshold's width on the current the staircase becomes
a polygon,

    S(u) = ∫ s(v) dv from |u| − 1/2 to |u| + 1/2,     u = x / θ

s the spikes of the count that v goes to: the expected spikes. Its gradient is what the staircase
gains across one threshold, ``s(|u| + 1/2) − s(|u| − 1/2)``, and it moves with the decisions, which
the price moves by ``Δs / (2·Δn)`` each (:mod:`spikellm.neurons.price`). Passed straight through,
that is the gradient of the true number.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from spikellm.neurons.phase import Recoding
from spikellm.neurons.price import SpikeForm, best_levels, spikes_of_counts


def expected_spikes(
    units: Tensor, price: Tensor | float, top: int, form: SpikeForm, recoding: Recoding = "binary"
) -> Tensor:
    """Expected spikes of every value, of the shape of ``units`` and differentiable in both.

    Args:
        units: current less than zero or not, in thresholds, ``x / θ``.
        price: λ, one number.
        top: largest count.
        form, recoding: of the spikes that are counted and have the price.
    """
    return _both(units, price, top, form, recoding)[0]


def spike_penalty(
    units: Tensor, price: Tensor | float, top: int, form: SpikeForm, recoding: Recoding = "binary"
) -> Tensor:
    """True spikes of every value with the gradient of :func:`expected_spikes`; arguments as
    there.
    """
    expected, true = _both(units, price, top, form, recoding)
    return expected + (true - expected).detach()


def _both(
    units: Tensor, price: Tensor | float, top: int, form: SpikeForm, recoding: Recoding
) -> tuple[Tensor, Tensor]:
    price = torch.as_tensor(price, dtype=units.dtype, device=units.device)
    spikes = spikes_of_counts(form, recoding, top)
    edges, counts = best_levels(float(price.detach()), spikes)
    spikes = spikes[counts].to(units)
    slopes = spikes.diff() / (2 * counts.diff().to(units))
    both = _Staircase.apply(units, price, edges.to(units), spikes, slopes)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], both)


class _Staircase(torch.autograd.Function):
    """Expected and true spikes; the second without a gradient."""

    @staticmethod
    def forward(
        ctx: Any, units: Tensor, price: Tensor, edges: Tensor, spikes: Tensor, slopes: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = units.detach().abs()
        rises = spikes.diff()
        # ∫ s from 0 to |v|: Σ rise · (|v| − edge) over the edges below
        starts = torch.cat([edges.new_zeros(1), (rises * edges).cumsum(0)])

        def area(v: Tensor) -> Tensor:
            at = torch.bucketize(v.abs(), edges, right=True)
            return spikes[at] * v.abs() - starts[at]

        # the noise may carry a small current across zero, where spikes count as well
        high, low = size + 0.5, size - 0.5
        ctx.save_for_backward(units, edges, spikes, rises * slopes)
        true = spikes[torch.bucketize(size, edges, right=True)]
        ctx.mark_non_differentiable(true)
        return area(high) - area(low).copysign(low), true

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        units, edges, spikes, moves = ctx.saved_tensors
        size = units.abs()
        high, low = size + 0.5, size - 0.5
        at, below = (torch.bucketize(v.abs(), edges, right=True) for v in (high, low))
        by_units = (spikes[at] - spikes[below]) * torch.sign(units)
        total = torch.cat([moves.new_zeros(1), moves.cumsum(0)])
        # an edge between both ends takes its rise from what lies above it
        by_price = -(total[at] - total[below].copysign(low))
        return gradients[0] * by_units, (gradients[0] * by_price).sum(), None, None, None
