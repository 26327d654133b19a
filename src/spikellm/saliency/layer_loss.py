"""Layer-loss saliency: the split of channels that makes the expected error of the layer's output least.

A rounding error is uniform in ±θ/2, so a group g of channels adds ``E[θ_g²/12]·Σ_{c∈g} ‖W[:,c]‖²``, where θ_g is the range that the
grouping itself leaves the group, divided by its steps. Several orders of channels are tried; along each, the loss of *every* cut comes from
one pass of running maxima. The order that is best at the cut asked for wins; :func:`best_cut` searches the cut as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.saliency.base import Evidence, criteria, ranking
from spikellm.saliency.expected_error import expected_error
from spikellm.saliency.value_range import maximum, rms

_CHUNK = 1024  # tokens at a time


def loss_of_cuts(evidence: Evidence, order: Tensor) -> Tensor:
    """Expected loss when the first k channels of ``order`` are salient, for every k: float64, ``(channels + 1,)``."""
    energy = evidence.column_energy[order].double()
    first = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    salient = rest = torch.zeros((), dtype=torch.float64)
    for x in evidence.x.split(_CHUNK):
        ordered = x[:, order]
        salient = salient + _running_range(ordered).square().sum(0)
        rest = rest + _running_range(ordered.flip(1)).square().sum(0).flip(0)
    if evidence.thresholds == "shared":
        salient = rest = rest[0].expand_as(rest)
    tokens, levels = evidence.x.shape[0], evidence.neuron.levels
    salient = salient / (12 * tokens * (levels * evidence.salient_steps) ** 2)
    rest = rest / (12 * tokens * (levels * evidence.steps) ** 2)
    return salient * first + rest * (first[-1] - first)


def _running_range(ordered: Tensor) -> Tensor:
    """Range (zero included) of the first k channels for k = 0 … channels: float64, ``(tokens, channels + 1)``."""
    start = ordered.new_zeros(ordered.shape[0], 1)
    padded = torch.cat([start, ordered], dim=1)
    return padded.cummax(1).values.double() - padded.cummin(1).values.double()


@criteria.register("layer-loss")
def layer_loss(evidence: Evidence) -> Tensor:
    """Rank of each channel (larger is more salient) in the order whose split at ``evidence.count`` loses least."""
    orders = [ranking(criterion(evidence)) for criterion in (maximum, rms, expected_error)]
    order = min(orders, key=lambda candidate: float(loss_of_cuts(evidence, candidate)[evidence.count]))
    scores = torch.empty(order.shape[0], device=order.device)
    scores[order] = torch.arange(order.shape[0], 0, -1, dtype=scores.dtype, device=order.device)
    return scores


def best_cut(evidence: Evidence, order: Tensor) -> int:
    """Number of salient channels, 1 … ``evidence.count``, with the least expected loss along an order."""
    return 1 + int(loss_of_cuts(evidence, order)[1 : evidence.count + 1].argmin())
