"""Clusters of channels that share a range (RPTQ, Yuan et al. 2023): channels whose largest and
smallest values are alike, and within a budget, the channels that take more steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.nn.fake_quant import InputCoder
from spikellm.quantization.kmeans import k_means
from spikellm.recipe import ActivationRecipe

_TOKENS = 1024  # on which the steps of channels are compared


def clusters_of(x: Tensor, count: int, seed: int) -> Tensor:
    """The cluster of every channel, uint8 ``(in,)``, smallest values first.

    k-means on ``(max, min)`` of every channel, each as the logarithm of one plus its multiple of
    the median channel's largest magnitude: on the values themselves the few largest channels would
    decide alone.

    Args:
        x: sampled inputs, float32, ``(tokens, in)``.
        count: how many clusters.
        seed: decides the starts of k-means.
    """
    ends = torch.stack([x.amax(0), x.amin(0)], 1).double()
    unit = x.abs().amax(0).double().median().clamp(min=torch.finfo(torch.float32).tiny)
    points = torch.sign(ends) * torch.log1p(ends.abs() / unit)
    return k_means(points, count, seed).to(torch.uint8).to(x.device)


def with_steps(
    settings: ActivationRecipe, cluster: Tensor, x: Tensor, weight: Tensor, count: int
) -> Tensor:
    """Group of every channel (see ``ActivationRecipe.group_ranges``): in each cluster, ordinary
    channels and those that take ``salient_steps``.

    The steps go to the channels whose rounding error they lower most at the outputs,
    ``Σ_n (e_T² − e_S²)·‖W[:,c]‖²``, in whatever clusters these are.

    Args:
        cluster: of every channel, uint8 ``(in,)``.
        x: sampled inputs, ``(tokens, in)``.
        weight: of all layers that read them, ``(out, in)``.
        count: how many channels take them.
    """
    x = x[:: -(-len(x) // _TOKENS)].float()
    plain = {"salient_rate": 0.0, "salient_steps": 1, "threshold_from": "range"}
    errors = [
        (InputCoder(one, cluster).values(x) - x).square().sum(0, dtype=torch.float64)
        for one in (
            settings.model_copy(update={**plain, "steps": steps})
            for steps in (settings.steps, settings.salient_steps)
        )
    ]
    energy = weight.detach().to(x.device).float().square().sum(0, dtype=torch.float64)
    gain = (errors[0] - errors[1]) * energy
    finer = torch.sort(gain, descending=True, stable=True).indices[:count]
    return (2 * cluster).index_add_(0, finer, torch.ones_like(cluster[:count]))
