"""Layer-loss saliency: the choice of channels with the least expected error of the layer's output.

A rounding error is uniform in ±θ/2, so a channel of range r and T steps adds
``E[r²]/(12·(T·L)²)·‖W[:,c]‖²``. A budget of salient channels can be spent in two ways: on a range
of their own for the channels that widen the common range, and on finer steps within the common
range for the channels whose weights matter most. In an order of channels (by size, or by
``‖W[:,c]‖²``) the first m get their own range, and the rest of the budget goes to the largest
``‖W[:,c]‖²`` among the others; the m and the order with the least loss are searched. The ranges for
all m come from one pass of running maxima. With shared ranges m is 0. Where all channels take one
step, only the range matters, and fewer channels than the budget may be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.saliency.base import Evidence, Selection, choose, criteria, ranking
from spikellm.saliency.value_range import maximum, rms

_CHUNK = 1024  # tokens at a time
_CUTS = 256  # that are compared at a time
_TOKENS = 2048  # ranges are averaged over; spread evenly


@criteria.register("layer-loss")
def layer_loss(evidence: Evidence) -> Selection:
    """The best own-range set and the best finer-step set for one budget of channels.

    It has no ranking, so ``invert`` does not apply.
    """
    orders = _orders(evidence)
    losses = [loss_of_cuts(evidence, order) for order in orders]
    best = min(range(len(orders)), key=lambda i: float(losses[i].min()))
    cut = int(losses[best].argmin())
    own = torch.zeros(evidence.x.shape[1], dtype=torch.bool, device=evidence.x.device)
    own[orders[best][:cut]] = True
    if evidence.salient_steps == evidence.steps:
        return Selection(own, own)
    energy = evidence.column_energy.masked_fill(own, -1.0)
    return Selection(own | choose(energy, evidence.count - cut), own)


def _orders(evidence: Evidence) -> list[Tensor]:
    return [
        ranking(scores) for scores in (maximum(evidence), rms(evidence), evidence.column_energy)
    ]


def least_losses(evidence: Evidence, counts: Sequence[int]) -> list[float]:
    """Expected loss of the best choice for each of several numbers of salient channels, in the
    place of ``evidence.count``: ranges are measured once for all.
    """
    most, channels = max(counts), evidence.x.shape[1]
    best = torch.full((len(counts),), torch.inf, dtype=torch.float64)
    for order in _orders(evidence):
        # a range of their own is for the few: looked for up to half of the channels
        losses = _Losses.of(evidence, order, min(most, channels // 2) if evidence.split else 0)
        for first in range(0, losses.largest + 1, _CUTS):
            cuts = range(first, min(first + _CUTS, losses.largest + 1))
            top = _top_energies(losses.energy, order, cuts, most)
            for place, count in enumerate(counts):
                fit = len([cut for cut in cuts if cut <= count])
                index = torch.arange(fit, device=order.device)
                finer = top[index, count - first - index]
                found = losses.at(slice(first, first + fit), finer)
                if fit:
                    best[place] = min(float(best[place]), float(found.min()))
    return [float(loss) for loss in best]


class _Losses(NamedTuple):
    """What the expected loss follows from when the first m = 0 … ``largest`` channels of an order
    have their own range: mean squares of both ranges, and the energy of the columns within; all
    float64.
    """

    evidence: Evidence
    largest: int
    energy: Tensor
    own_power: Tensor
    rest_power: Tensor
    own_energy: Tensor

    @classmethod
    def of(cls, evidence: Evidence, order: Tensor, largest: int) -> _Losses:
        energy = evidence.column_energy.double()
        powers = _mean_square_ranges(evidence, order, largest)
        own = torch.cat([energy.new_zeros(1), energy[order].cumsum(0)])[: largest + 1]
        return cls(evidence, largest, energy, *powers, own)

    def at(self, cuts: slice, finer_energy: Tensor) -> Tensor:
        """Losses for these m, where columns of so much energy take more steps beside them."""
        evidence, own_energy = self.evidence, self.own_energy[cuts]
        rest_energy = self.energy.sum() - own_energy - finer_energy
        coarse, fine = (
            1 / (12 * evidence.neuron.top(steps) ** 2)
            for steps in (evidence.steps, evidence.salient_steps)
        )
        return self.own_power[cuts] * fine * own_energy + self.rest_power[cuts] * (
            fine * finer_energy + coarse * rest_energy
        )


def loss_of_cuts(evidence: Evidence, order: Tensor) -> Tensor:
    """Expected loss when the first m channels of ``order`` have their own range, for m = 0 … count
    (0 alone with shared ranges).

    Returns:
        float64, ``(cuts,)``.
    """
    losses = _Losses.of(evidence, order, evidence.count if evidence.split else 0)
    finer_energy = torch.stack(
        [
            _top_energy_without(losses.energy, order[:cut], evidence.count - cut)
            for cut in range(losses.largest + 1)
        ]
    )
    return losses.at(slice(None), finer_energy)


def _mean_square_ranges(evidence: Evidence, order: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Mean over tokens of the squared range of the first m channels, and of the others, for m = 0 …
    largest.
    """
    x = evidence.x[:: -(-evidence.x.shape[0] // _TOKENS)]
    own = rest = torch.zeros(largest + 1, dtype=torch.float64, device=x.device)
    for part in x.split(_CHUNK):
        ordered = part[:, order]
        own = own + _running_range(ordered[:, :largest], evidence.symmetric).double().square().sum(
            0
        )
        rest = rest + _running_range(ordered.flip(1), evidence.symmetric).flip(1)[
            :, : largest + 1
        ].double().square().sum(0)
    return own / x.shape[0], rest / x.shape[0]


def _running_range(ordered: Tensor, symmetric: bool) -> Tensor:
    """Range (zero included) of the first m channels for m = 0 … channels, ``(tokens, channels +
    1)``; twice the reach if symmetric.
    """
    padded = torch.cat([ordered.new_zeros(ordered.shape[0], 1), ordered], dim=1)
    return (
        2 * padded.abs().cummax(1).values
        if symmetric
        else padded.cummax(1).values - padded.cummin(1).values
    )


def _top_energy_without(energy: Tensor, taken: Tensor, count: int) -> Tensor:
    return (
        energy.index_fill(0, taken, 0.0).topk(count).values.sum() if count else energy.new_zeros(())
    )


def _top_energies(energy: Tensor, order: Tensor, cuts: range, most: int) -> Tensor:
    """:func:`_top_energy_without` the first m channels of ``order``, for m in ``cuts`` and counts
    of 0 … ``most``: ``(cuts, most + 1)``.
    """
    place = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )
    largest = torch.sort(energy, descending=True).indices  # sorted once, for all cuts
    left = place[largest] >= torch.tensor(cuts, device=order.device).unsqueeze(1)
    found = energy.new_zeros(len(cuts), most + 1)
    for row, kept in zip(found, left, strict=True):
        sums = energy[largest[kept]][:most].cumsum(0)
        row[1 : len(sums) + 1] = sums
        row[len(sums) + 1 :] = sums[-1] if len(sums) else 0.0
    return found
