"""Weights that are a sum of planes of ±1: binary-coded ones, and BiLLM's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from layers import PLANES
from native import planes
from spikellm.algorithms.gptq_layer import Target, fit_layer
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.kernels.base import select
from spikellm.models.swap import spiking_for
from spikellm.nn.channels import Groups
from spikellm.nn.constant_thresholds import constant_thresholds
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.validation import validation_error
from spikellm.profiling.counted_layer import counted_layer
from spikellm.profiling.fan_out import fan_out
from spikellm.profiling.population import layer_population
from spikellm.profiling.trace import _check_layer
from spikellm.recipe import ActivationRecipe, LinearRecipe

KINDS = sorted(PLANES)


def layer_of(kind: str, columns: int = 70, outputs: int = 9, **activations: Any) -> SpikingLinear:
    recipe = ActivationRecipe(**(activations or {"bits": 16}))
    generator = torch.Generator().manual_seed(columns)
    return planes(columns, outputs, PLANES[kind], generator, bias=True, activations=recipe)


@given(st.sampled_from(KINDS), st.integers(1, 150), st.integers(1, 20))
def test_a_layer_is_the_sum_of_its_planes(kind: str, columns: int, outputs: int) -> None:
    layer = layer_of(kind, columns, outputs)
    x = torch.randn(4, columns, dtype=torch.float64).float()
    expected = x @ layer.dense_weight().T + layer.bias
    for form in ("merged", "stepped", "binary"):
        set_execution_mode(layer, form)  # type: ignore[arg-type]
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    order = layer.layout().order
    values = sum(one.dense_weight() for one in layer.planes())
    assert torch.equal(values, layer.dense_weight())
    signs = [one.integer_weights() for one in layer.planes()]
    assert {int(v) for one in signs for v in one.unique()} <= {-1, 0, 1}
    additions = sum(one.abs().sum(0) for one in signs)
    steps = layer.weight_steps
    each = torch.full((columns,), 2) if steps is None else steps
    stored = each if order is None else each[order]
    assert torch.equal(additions, stored.long() * outputs), "as many as a column has planes"
    assert torch.equal(fan_out(layer)[:, 0], additions)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str) -> None:
    layer = layer_of(kind)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    again = SpikingLinear(
        70, 9, layer.settings, bias=True, sizes=layer.format.sizes_of(state), dtype=torch.float32
    )
    again.load_state_dict(state)
    assert again.validation_error() is None
    x = torch.randn(3, 70)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neuron", [{"bits": 3}, {"bits": 2, "neuron": "ternary"}])
def test_four_forms_are_equal_bit_for_bit(kind: str, neuron: dict[str, Any]) -> None:
    symmetric = "neuron" in neuron
    layer = layer_of(kind, **neuron, symmetric=symmetric, train="centered", steps=2)
    x = torch.randn(5, 70)
    merged = layer(x)
    for form in ("stepped", "binary", "phase"):
        set_execution_mode(layer, form)  # type: ignore[arg-type]
        assert torch.equal(layer(x), merged), form


class Operations(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


MULTIPLICATIONS = {
    *("mul", "mul_", "div", "div_", "mm", "bmm", "addmm", "addmv", "mv", "dot", "matmul", "linear"),
    *("addcmul", "addcdiv", "reciprocal", "pow", "ldexp", "square", "einsum", "baddbmm"),
}


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_no_multiplication_where_scales_are_sums_of_powers_of_two(terms: int) -> None:
    weights = {"format": "bcq", "group_size": 20, "scale_terms": terms}
    generator = torch.Generator().manual_seed(terms)
    layer, free = (planes(50, 9, kind, generator) for kind in (weights, PLANES["bcq"]))
    x = torch.randn(4, 50)
    merged = layer(x)
    for one in (layer, free):
        set_execution_mode(one, "stepped")
        one(x)  # is prepared
        with Operations() as ran:
            found = one(x)
        assert "embedding_bag" in str(ran.names), "sums are taken"
        assert (one is free) == bool(ran.names & MULTIPLICATIONS), ran.names
        if one is layer:
            torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["stepped", "binary", "phase"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_multiplication_with_spikes_of_thresholds_of_powers_of_two(
    form: Any, symmetric: bool
) -> None:
    activations = ActivationRecipe(
        bits=4,
        threshold_from="calibration",
        power_of_two=True,
        train="centered",
        symmetric=symmetric,
        salient_rate=0.1,
        salient_steps=2,
    )
    weights = {"format": "bcq", "group_size": 20, "scale_terms": 3}
    x = torch.randn(60, 50) * torch.rand(50)
    layer = planes(50, 9, weights, torch.Generator().manual_seed(1), activations=activations)
    dense = layer.dense_weight()
    fixed = constant_thresholds(activations, layer.channel_group, x, dense)
    assert all(math.frexp(theta)[0] == 0.5 for theta in fixed.theta.tolist())
    layer.set_groups(layer.channel_group, fixed=fixed)
    merged = layer(x)
    assert float((merged - x @ dense.T).square().mean() / (x @ dense.T).square().mean()) < 0.05
    set_execution_mode(layer, form)
    layer(x)
    with Operations() as ran:
        found = layer(x)
    assert not ran.names & MULTIPLICATIONS, ran.names & MULTIPLICATIONS
    assert torch.equal(found, merged), "the bits of the products"
    x[3, 4] = float("nan")
    assert torch.equal(layer(x).isnan().any(1), torch.arange(60) == 3)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_trained_about_constant_weights(kind: str) -> None:
    layer = layer_of(kind, bits=4)
    layer.share_ranges()
    shares = layer.get_buffer("group_share").requires_grad_(True)
    x = torch.randn(5, 70, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert shares.grad is not None
    assert bool(torch.isfinite(shares.grad).all())
    assert x.grad is not None
    assert bool((x.grad != 0).any())


@pytest.mark.parametrize("form", ["binary", "phase"])
def test_traces_leave_out_accumulators_that_do_not_exist(form: Any) -> None:
    layer = layer_of("mixed", bits=4, train="centered")
    x = torch.randn(6, 70)
    found = _check_layer(layer_population("layer", layer, x), layer, layer(x), form)
    assert found.equal
    assert not found.mismatches
    facts, sums = counted_layer(layer), sum(layer.spec().planes)
    assert len(facts.accumulators) == sums < 4 * len(layer.layout().segments)
    assert found.integers == 6 * layer.out_features * sums
    assert found.shifts == (facts.doublings * 6 * layer.out_features if form == "phase" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_single(kind: str) -> None:
    layer = layer_of(kind)
    x = torch.randn(3, 70).to(torch.bfloat16)
    assert torch.equal(layer(x), layer(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize(
    "weights",
    [
        {"format": "ternary", "packing": "digits"},
        {"format": "ternary", "packing": "digits", "budget": 1.5},
        {"format": "ternary"},
        {"format": "bcq"},
        {"format": "bcq", "budget": 1.5},
        {"format": "billm"},
        {"format": "partly-binary", "salient_rate": 0.1},
    ],
)
def test_sizes_are_those_of_the_tensors(weights: dict[str, Any]) -> None:
    """Fitted and taken from a file or a journal, a layer is described in the same words."""
    settings = LinearRecipe.model_validate({"weights": weights, "activations": {"bits": 16}})
    dense = torch.nn.Linear(40, 8).requires_grad_(False)
    x = torch.randn(90, 40)
    groups = Groups(torch.zeros(40, dtype=torch.uint8), None)
    options = GptqOptions(rounds=1) if weights["format"] in ("ternary", "bcq") else GptqOptions()
    layer, _ = fit_layer("l", dense, settings, groups, Target((x.T @ x).double()), options)
    state = layer.state_dict()
    assert spiking_for(dense, settings, state).sizes == layer.sizes
    assert validation_error(layer) is None
    layer.shape = layer.shape._replace(sizes=(*layer.sizes, 5))
    assert "sizes in config.json" in str(validation_error(layer))


def test_stored_bytes() -> None:
    layer = layer_of("bcq", 256, 8)
    held = {name: one.numel() * one.element_size() for name, one in layer.named_buffers()}
    assert held["weight_planes"] == 2 * 256 * 8 // 8
    assert held["weight_scale"] == 8 * 2 * 3 * 2, "two planes of three groups of 100, in bfloat16"
    assert "column_steps" not in held, "all columns are alike"


def test_kernels_of_ternary_layers_run_them(native_kernels: object, level: str) -> None:
    if level:
        assert select(layer_of("bcq").spec(), "cpu").name == "native"


@pytest.mark.parametrize(
    ("kind", "name", "value", "says"),
    [
        ("mixed", "column_steps", 9, "expected 1 to 4"),
        ("mixed", "column_steps", 0, "expected 1 to 4"),
        ("billm", "column_steps", 0, "other than 1 and 2"),
        ("billm", "weight_scale", 1.625, "more than 2 powers of two"),
    ],
)
def test_damage_is_found(kind: str, name: str, value: float, says: str) -> None:
    layer = layer_of(kind)
    layer.get_buffer(name).view(-1)[0] = value
    assert says in str(layer.validation_error())


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"format": "bcq", "planes": 2, "budget": 1.5}, "leave one of them out"),
        ({"format": "bcq", "allocation": "model"}, "no effect without a budget"),
        ({"format": "bcq", "scale_bits": 32, "scale_terms": 1}, "take 16 bits"),
        ({"format": "bcq", "planes": 5}, "less than or equal to 4"),
        ({"format": "bcq", "budget": 1.0}, "greater than 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(weights: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LinearRecipe.model_validate({"weights": weights, "activations": {"bits": 16}})
