"""Native kernels beside the torch path."""

from __future__ import annotations

import os

import pytest
import torch
from spikellm.nn.additive import AdditiveLinear, plane_sizes
from torch import Tensor

from spikellm.kernels.native import build, ops
from spikellm.nn import fast
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe import ActivationRecipe, LinearRecipe

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="no C compiler on this machine"
)


def forget() -> None:
    """Look for kernels anew, as the environment says now."""
    build.load_library.cache_clear()
    ops._problem.cache_clear()


def best_level() -> int:
    """Index of the best level that this processor bears."""
    return int(build._load("portable").spikellm_best_level()) if build.compiler() else 0


def both(layer: SpikingLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the native kernel and of the torch path."""
    with torch.no_grad():
        assert fast.run(layer, x.reshape(-1, layer.in_features)) is not None, "the kernel is taken"
        found = layer(x)
        os.environ["SPIKELLM_KERNELS"] = "torch"
        try:
            return found, layer(x)
        finally:
            os.environ["SPIKELLM_KERNELS"] = "native"


def additive(
    columns: int,
    outputs: int,
    steps: Tensor,
    generator: torch.Generator,
    *,
    bias: bool = False,
    activations: ActivationRecipe | None = None,
) -> AdditiveLinear:
    """A layer of random ternary weights whose columns take ``steps``.

    Inputs are not coded, unless a recipe says how.
    """
    activations = activations or ActivationRecipe(bits=16)
    settings = LinearRecipe(weights="ternary", activations=activations)
    layer = AdditiveLinear(columns, outputs, settings, bias=bias, sizes=plane_sizes(steps))
    groups = torch.randint(0, len(activations.group_steps), (columns,), generator=generator).to(
        torch.uint8
    )
    layer.set_groups(groups, steps)
    most = layer.stored(steps).float()
    codes = (
        (torch.rand(outputs, columns, generator=generator) * (2 * most + 1))
        .floor()
        .sub(most)
        .to(torch.int8)
    )
    groups = len(layer.layout().weight_groups)
    layer.set_weights(
        AffineWeights(
            codes,
            torch.rand(outputs, groups, generator=generator) + 0.1,
            torch.zeros(outputs, groups, dtype=torch.uint8),
        )
    )
    if layer.bias is not None:
        layer.bias.data = torch.randn(outputs, generator=generator)
    return layer
