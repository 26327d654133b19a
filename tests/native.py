"""Native kernels beside the torch path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spikellm.kernels import select
from spikellm.kernels.native import backend, build
from spikellm.nn.formats import format_of
from spikellm.nn.formats.bcq import PlaneWeights
from spikellm.nn.formats.partly_binary import PartlyBinaryWeights
from spikellm.nn.formats.ternary import plane_sizes
from spikellm.nn.hooks import spike_observer
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.prepared import PreparedModule
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.bcq import Rounding
from spikellm.recipe import ActivationRecipe, LinearRecipe

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="no C compiler on this machine"
)


def forget() -> None:
    """Look for kernels anew, as the environment says now."""
    build.load_library.cache_clear()
    backend.problem.cache_clear()


def best_level() -> int:
    """Index of the best level that this processor bears."""
    return int(build._load("portable").spikellm_best_level()) if build.compiler() else 0


def both(layer: SpikingLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the native kernel and of the reference."""
    with torch.no_grad():
        layer.forget()
        assert runs_on(layer) == "native", "the kernel is taken"
        found = layer(x)
        assert layer._kernels is not None
        if spike_observer() is None:
            return found, layer._kernels.reference(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPIKELLM_KERNELS", "torch")
            layer.forget()
            return found, layer(x)


def runs_on(layer: SpikingLinear) -> str:
    """Name of the backend that a layer is given."""
    return select(layer.spec(), layer.weight_scale.device).name


def anew(model: torch.nn.Module) -> None:
    """Let a model choose its kernels again, as the environment says now."""
    for module in model.modules():
        if isinstance(module, PreparedModule):
            module.forget()


def additive(
    columns: int,
    outputs: int,
    steps: Tensor,
    generator: torch.Generator,
    *,
    bias: bool = False,
    activations: ActivationRecipe | None = None,
) -> SpikingLinear:
    """A layer of random ternary weights whose columns take ``steps``.

    Inputs are not coded, unless a recipe says how.
    """
    activations = activations or ActivationRecipe(bits=16)
    settings = LinearRecipe(weights="ternary", activations=activations)
    layer = SpikingLinear(columns, outputs, settings, bias=bias, sizes=plane_sizes(steps))
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


def planes(
    columns: int,
    outputs: int,
    weights: dict[str, Any],
    generator: torch.Generator,
    *,
    bias: bool = False,
    activations: ActivationRecipe | None = None,
) -> SpikingLinear:
    """A layer of random planes, in the format that ``weights`` says; where columns differ, in
    random ones.
    """
    activations = activations or ActivationRecipe(bits=16)
    settings = LinearRecipe(weights=weights, activations=activations)
    kind, steps = format_of(settings.weights), None
    if weights["format"] == "billm" or "budget" in weights:
        most = 2 if weights["format"] == "billm" else settings.weights.most_planes
        steps = torch.randint(1, most + 1, (columns,), generator=generator).to(torch.uint8)
    layer = SpikingLinear(
        columns, outputs, settings, bias=bias, sizes=kind.fitted_sizes(None, steps)
    )
    groups = torch.randint(0, len(activations.group_steps), (columns,), generator=generator)
    layer.set_groups(groups.to(torch.uint8), steps)
    count = max(kind.planes_by_group(layer))
    shape = (outputs, len(layer.layout().weight_groups), count)
    patterns = torch.randint(0, 1 << count, (outputs, columns), generator=generator)
    if "budget" in weights:  # no bits of planes that a column lacks
        patterns &= (1 << layer.stored(layer.get_buffer("column_steps")).long()) - 1
    scale = torch.rand(shape, generator=generator) + 0.1
    rounding = Rounding(settings.weights.scale_bits, settings.weights.scale_terms)
    layer.set_weights(PlaneWeights(patterns.to(torch.uint8), rounding(scale)))
    if layer.bias is not None:
        layer.bias.data = torch.randn(outputs, generator=generator)
    return layer


def partly_binary(
    columns: int, outputs: int, rate: float, group: int | None, seed: int
) -> SpikingLinear:
    """A layer of random weights, of which a share is salient."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"format": "partly-binary", "bits": 8, "salient_rate": 0.1, "group_size": group}
    settings = LinearRecipe(weights=weights, activations=ActivationRecipe(bits=16))
    shape = (outputs, columns)
    salient = torch.rand(shape, generator=generator) < rate
    layer = SpikingLinear(columns, outputs, settings, sizes=(int(salient.sum()),))
    groups = layer.layout().weight_groups
    layer.set_weights(
        PartlyBinaryWeights(
            salient,
            torch.rand(shape, generator=generator) < 0.5,
            torch.rand(outputs, len(groups), generator=generator) + 0.1,
            torch.randint(0, 256, shape, generator=generator).to(torch.uint8),
            torch.rand(outputs, 1, generator=generator) / 50 + 0.001,
            torch.randint(0, 256, (outputs, 1), generator=generator).to(torch.uint8),
        )
    )
    assert layer.bias is not None
    layer.bias.copy_(torch.randn(outputs, generator=generator))
    return layer
