"""Which input channels of a layer are rotated among each other while the model runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spikellm.models.rounding import fit_layer
from spikellm.nn.channels import Groups, Sample, group_of, salient_channels, seed_of
from spikellm.nn.rotation import Rotation
from spikellm.quantization.hadamard import random_signs
from spikellm.recipe import LinearRecipe, WeightRecipe
from spikellm.saliency import salient_count

_TOKENS = 1024  # on which a choice is measured


def choose_signs(
    name: str, x: Tensor, weight: Tensor, settings: LinearRecipe, choose: str, seed: int
) -> Tensor:
    """Signs of :class:`spikellm.nn.rotation.Rotation`, uint8 ``(in,)``.

    Args:
        x: sampled inputs, float64, ``(tokens, in)``.
        weight: of the layer, float64, ``(out, in)``.
        choose: ``"all"``, or ``"loss"``: what loses least when the sample goes through the layer
            with its weights rounded to nearest: no rotation, all channels, or all but the largest,
            where the settings let as many of this layer's channels have a range of their own.
        seed: of the signs.
    """
    signs = random_signs(x.shape[1], seed_of(name, seed))
    everything = torch.where(signs > 0, 1, 2).to(torch.uint8).to(x.device)
    if choose == "all":
        return everything
    x = x[:: -(-len(x) // _TOKENS)]
    exact = x @ weight.T
    losses = [
        (_loss(x, weight, exact, settings, candidate, seed, name), place, candidate)
        for place, candidate in enumerate(_candidates(x, everything, settings))
    ]
    return min(losses)[2]


def _candidates(x: Tensor, everything: Tensor, settings: LinearRecipe) -> Iterator[Tensor]:
    yield everything
    yield torch.zeros_like(everything)
    activations = settings.activations
    if (
        activations.salient_rate == 0
        or activations.thresholds != "split"
        or activations.allocated_over_model
    ):
        return  # shared out over the model, this layer's share is not known yet
    largest = torch.sort(x.abs().amax(0), descending=True, stable=True).indices
    count = 1
    while count <= salient_count(activations.salient_rate, x.shape[1]):
        yield everything.index_fill(0, largest[:count], 0)
        count *= 2


def _loss(
    x: Tensor,
    weight: Tensor,
    exact: Tensor,
    settings: LinearRecipe,
    signs: Tensor,
    seed: int,
    name: str,
) -> float:
    rotation = Rotation.of(signs)
    turned, columns = rotation(x).float(), rotation(weight).float()
    group = torch.zeros_like(signs)
    if settings.activations.salient_rate > 0 and not settings.activations.allocated_over_model:
        sample = Sample(turned, columns)
        group = group_of(salient_channels(sample, settings.activations, seed, name))
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    dense.weight = nn.Parameter(columns, requires_grad=False)
    plain = LinearRecipe(
        weights=WeightRecipe(bits=settings.weights.bits), activations=settings.activations
    )
    found = fit_layer(dense, plain, Groups(group, None))(turned)
    return float((found - exact).square().sum())
