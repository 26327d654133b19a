"""Clusters of channels with a range each, and thresholds that are constants, in single layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from native import both, needs_compiler
from spikellm.models.rounding import fit_layer
from spikellm.nn.channels import Groups, Sample, grouped
from spikellm.nn.clusters import clusters_of
from spikellm.nn.constant_thresholds import constant_thresholds
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.validation import validation_error, wrong_stored_type
from spikellm.quantization.thresholds import token_range
from spikellm.recipe import ActivationRecipe, LinearRecipe

STATIC = {"threshold_from": "calibration"}
SEARCHED = {**STATIC, "search_range": True}
FINER = {"salient_rate": 0.2, "salient_steps": 2}
TERNARY = {"bits": 2, "neuron": "ternary", "symmetric": True}
KINDS: list[dict[str, Any]] = [
    {"bits": 4, "clusters": 4},
    {"bits": 4, "clusters": 4, "search_range": True},
    {"bits": 4, "clusters": 3, **FINER},
    {"bits": 4, "clusters": 3, "token_steps": 2},
    {**TERNARY, "clusters": 3, "threshold_from": "mean"},
    {"bits": 8, **STATIC},
    {"bits": 4, **SEARCHED, "clusters": 4},
    {"bits": 4, **SEARCHED, "clusters": 3, **FINER},
    {"bits": 4, **SEARCHED, **FINER},
    {"bits": 4, **SEARCHED, **FINER, "thresholds": "shared"},
    {"bits": 3, **SEARCHED, "symmetric": True, "clusters": 2},
    {**TERNARY, **SEARCHED, "clusters": 3, "steps": 2},
    {"bits": 2, "neuron": "elastic", "symmetric": True, "steps": 3, **SEARCHED, "clusters": 2},
]
CONSTANT = [kind for kind in KINDS if kind.get("threshold_from") == "calibration"]


def sample(columns: int = 40, tokens: int = 200) -> Tensor:
    """Channels of very different sizes, some of one sign."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-1, 1.5, columns)[torch.randperm(columns, generator=generator)]
    x = torch.randn(tokens, columns, generator=generator) * sizes
    x[:, ::7] = x[:, ::7].abs()
    return x


def layer_with(kind: dict[str, Any], train: str = "centered", **weights: Any) -> SpikingLinear:
    torch.manual_seed(0)
    settings = LinearRecipe.model_validate(
        {"weights": {"bits": 4, **weights}, "activations": {**kind, "train": train}}
    )
    dense, x, activations = nn.Linear(40, 6), sample(), settings.activations
    group = grouped(Sample(x, dense.weight.detach()), activations, 0, "layer")
    fixed = None
    if activations.static:
        fixed = constant_thresholds(activations, group, x, dense.weight)
    return fit_layer(dense, settings, Groups(group, None, fixed=fixed))


def test_clusters_follow_the_sizes_of_channels() -> None:
    x = sample()
    cluster, reach = clusters_of(x, 4, 0), x.abs().amax(0)
    assert torch.equal(cluster, clusters_of(x, 4, 0))
    inside = [float(reach[cluster == one].max() / reach[cluster == one].min()) for one in range(4)]
    assert max(inside) < 0.1 * float(reach.max() / reach.min())
    assert float(reach[cluster == 0].max()) < float(reach[cluster == 3].min())
    assert torch.equal(cluster, clusters_of(1000 * x, 4, 0)), "whatever the unit"


@pytest.mark.parametrize("train", ["published", "centered"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_give_the_same_bits(kind: dict[str, Any], train: str) -> None:
    layer, x = layer_with(kind, train), 1.2 * sample(tokens=9)
    merged = layer(x)
    for mode in ("stepped", "binary", "phase"):
        layer.execution_mode = mode  # type: ignore[assignment]
        assert torch.equal(layer(x), merged), mode


@needs_compiler
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_native_kernels_give_the_same_bits(kind: dict[str, Any], group_size: int | None) -> None:
    layer, x = layer_with(kind, group_size=group_size), 1.2 * sample(tokens=33)
    x[3] = 0.0
    for some in (x, x[:1]):
        native, reference = both(layer, some)
        assert torch.equal(native, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_sees_the_same_codes(kind: dict[str, Any]) -> None:
    layer, x = layer_with(kind), 1.2 * sample(tokens=9)
    coder = InputCoder(
        layer.settings.activations,
        layer.channel_group,
        layer.range_share,
        layer.massive,
        fixed=layer.fixed,
    )
    codes, thresholds = layer.encode(x)
    stored = layer.stored(coder.values(x).T).T
    for (theta, z), (start, stop) in zip(thresholds, layer.spec().bounds, strict=True):
        assert torch.equal(stored[:, start:stop], theta * (codes[:, start:stop] - z))


def test_each_cluster_has_the_range_of_its_channels() -> None:
    layer, x = layer_with({"bits": 4, "clusters": 4}), sample(tokens=5)
    _, thresholds = layer.encode(x)
    for group, (theta, _) in enumerate(thresholds):
        low, high = token_range(x[:, layer.channel_group == group])
        assert torch.equal(theta, high / 15 - low / 15)


def test_weights_cost_no_more_scales_for_clusters() -> None:
    for kind in ({"bits": 4}, {"bits": 4, "clusters": 8}):
        assert layer_with(kind).weight_scale.shape == (6, 1)
    layer = layer_with({"bits": 4, "clusters": 8}, group_size=16)
    assert layer.layout().weight_groups == [(0, 16), (16, 32), (32, 40)]


def test_more_clusters_lose_less() -> None:
    x = sample()
    for more in ({}, SEARCHED):
        lost = []
        for clusters in (1, 2, 4, 8):
            layer = layer_with({"bits": 4, "clusters": clusters, **more}, bits=8)
            exact = x @ layer.dense_weight().T + layer.bias
            lost.append(float((layer(x) - exact).norm()))
        assert lost == sorted(lost, reverse=True)
        assert lost[-1] < 0.65 * lost[0]


def test_steps_go_to_the_channels_that_lose_most() -> None:
    x = sample()
    lost = []
    for more in ({}, FINER):
        layer = layer_with({"bits": 4, "clusters": 3, **more}, bits=8)
        exact = x @ layer.dense_weight().T + layer.bias
        lost.append(float((layer(x) - exact).norm()))
    assert lost[1] < lost[0]
    assert int(layer.salient.sum()) == 8 == int((layer.channel_steps == 2).sum())
    assert not bool(layer.own_range.any())


@pytest.mark.parametrize("kind", CONSTANT)
def test_a_token_s_codes_depend_on_no_other_value(kind: dict[str, Any]) -> None:
    layer, x = layer_with(kind), sample(tokens=4)
    codes, thresholds = layer.encode(x)
    for theta, z in thresholds:
        assert bool((theta == theta[0]).all())
        assert bool((z == z[0]).all())
    other = x.clone()
    other[:, 0] *= 1000
    place = int((layer.stored(torch.arange(40)) == 0).nonzero())
    moved, same = layer.encode(other)[0], torch.arange(40) != place
    assert torch.equal(moved[:, same], codes[:, same])


@needs_compiler
@pytest.mark.parametrize("kind", CONSTANT)
def test_what_is_not_finite_stays_so(kind: dict[str, Any]) -> None:
    layer, x = layer_with(kind), sample(tokens=4)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    native, reference = both(layer, x)
    for y in (native, reference):
        assert bool(torch.isnan(y[1:3]).all())
        assert bool(torch.isfinite(y[[0, 3]]).all())
    x[2, 5] = 3e38
    assert bool(torch.isfinite(layer(x)[2]).all()), "what lies beyond takes the last code"


def test_searched_percentiles_lose_less_than_the_whole_range() -> None:
    x = sample(tokens=600)
    x[::50] *= 6
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    lost = []
    for more in (STATIC, SEARCHED):
        settings = ActivationRecipe.model_validate({"bits": 4, "clusters": 4, **more})
        group = clusters_of(x, 4, 0)
        fixed = constant_thresholds(settings, group, x, weight)
        again = constant_thresholds(settings, group, x, weight)
        assert all(map(torch.equal, fixed, again))
        error = InputCoder(settings, group, fixed=fixed).values(x) - x
        lost.append(float((error @ weight.T).square().sum()))
    assert lost[1] < 0.8 * lost[0]


def test_errors_of_tokens_are_weighed() -> None:
    x, weight = sample(tokens=100), torch.randn(12, 40)
    x[0] *= 100
    settings = ActivationRecipe.model_validate({"bits": 4, **SEARCHED})
    group, scale = torch.zeros(40, dtype=torch.uint8), torch.ones(100, 1)
    whole = constant_thresholds(settings, group, x, weight)
    scale[0] = 1e-4
    assert float(constant_thresholds(settings, group, x, weight, scale).theta) < 0.1 * float(
        whole.theta
    )


def test_constants_are_state_and_are_checked() -> None:
    layer = layer_with({"bits": 4, **SEARCHED, "clusters": 4})
    state = layer.state_dict()
    assert state["group_threshold"].dtype == state["group_baseline"].dtype == torch.float32
    other = SpikingLinear(40, 6, layer.settings)
    other.load_state_dict(state)
    x = sample(tokens=3)
    assert torch.equal(other(x), layer(x))
    assert validation_error(other, "layer") is None
    assert "F64" in str(wrong_stored_type(other, {"group_baseline": "F64"}))
    for name, bad in (
        ("group_threshold", 0.0),
        ("group_threshold", float("inf")),
        ("group_baseline", 16.0),
        ("group_baseline", 1.5),
    ):
        other.load_state_dict(state)
        other.get_buffer(name)[1] = bad
        assert name in str(validation_error(other, "layer")), bad
    other.load_state_dict(state)
    other.get_buffer("group_threshold").mul_(2.0)
    assert not torch.equal(other(x), layer(x)), "and they have an effect at once"


def test_layers_without_constants_have_no_such_buffers() -> None:
    state = layer_with({"bits": 4, "clusters": 4}).state_dict()
    assert not {"group_threshold", "group_baseline"} & set(state)


def test_empty_clusters_do_no_harm() -> None:
    settings = LinearRecipe.model_validate(
        {"activations": {"bits": 4, "clusters": 8, **SEARCHED}, "weights": {"bits": 4}}
    )
    dense, x = nn.Linear(40, 6), torch.ones(50, 40)
    group = clusters_of(x, 8, 0)
    assert group.tolist() == [0] * 40
    fixed = constant_thresholds(settings.activations, group, x, dense.weight)
    layer = fit_layer(dense, settings, Groups(group, None, fixed=fixed))
    assert validation_error(layer, "layer") is None
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T + dense.bias)


@pytest.mark.parametrize("kind", CONSTANT)
def test_gradients_pass_where_values_are_coded(kind: dict[str, Any]) -> None:
    layer, x = layer_with(kind), sample(tokens=5)
    layer.weight_scale.requires_grad_()
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y.detach(), layer(x.detach()).detach())
    y.sum().backward()
    assert bool(torch.isfinite(layer.weight_scale.grad).all())  # type: ignore[arg-type]
    neuron, order = layer.neuron, layer.layout().order
    assert neuron is not None
    assert x.grad is not None
    weight = layer.dense_weight().sum(0)
    if neuron.stops_gradients:
        theta = layer.fixed.theta[layer.channel_group.long()]  # type: ignore[union-attr]
        beyond = x.detach().abs() > theta * int(neuron.top(3))
        assert bool(beyond.any())
        weight = weight * ~beyond
    torch.testing.assert_close(x.grad, weight.expand_as(x), rtol=1e-4, atol=1e-5)
    assert order is None or sorted(order.tolist()) == list(range(40))
