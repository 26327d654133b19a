from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layers import PRICED, fit
from spikellm.core.errors import RequestError
from spikellm.kernels.torch.product import integer_product
from spikellm.nn.channels import Groups, coding_of, group_of
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import dequantize
from spikellm.recipe import LinearRecipe
from spikellm.saliency import Selection


def make(
    weights: dict[str, Any],
    activations: dict[str, Any],
    *,
    inputs: int = 13,
    outputs: int = 7,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[SpikingLinear, nn.Linear]:
    torch.manual_seed(seed)
    dense = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    settings = LinearRecipe.model_validate({"weights": weights, "activations": activations})
    sample = torch.randn(30, inputs)
    sample[:, 0] *= 20
    return fit(dense, settings, sample, seed), dense


CODINGS = st.one_of(
    st.fixed_dictionaries(
        {"bits": st.integers(1, 4), "steps": st.integers(1, 3), "symmetric": st.just(False)}
    ),
    st.fixed_dictionaries({"bits": st.integers(2, 4), "symmetric": st.booleans()}),
    st.fixed_dictionaries(
        {
            "bits": st.just(2),
            "neuron": st.just("ternary"),
            "symmetric": st.just(True),
            "steps": st.integers(1, 4),
        }
    ),
    st.fixed_dictionaries(
        {"bits": st.just(1), "neuron": st.just("if"), "steps": st.integers(2, 9)}
    ),
    st.fixed_dictionaries(
        {
            "bits": st.integers(1, 4),
            "salient_rate": st.sampled_from([0.05, 0.3, 0.6]),
            "salient_steps": st.integers(2, 4),
            "saliency": st.sampled_from(["layer-loss", "rms", "first-order"]),
            "thresholds": st.sampled_from(["split", "shared"]),
            "token_steps": st.sampled_from([0, 5, 16]),
        }
    ),
    st.fixed_dictionaries({"bits": st.integers(2, 8), "token_steps": st.sampled_from([2, 8])}),
)
TRAINS = st.fixed_dictionaries(
    {
        "train": st.sampled_from(["centered", "published"]),
        "recoding": st.sampled_from(["binary", "signed-digit"]),
    }
)


def _priced(drawn: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    coding, train, price = drawn
    takes = train["train"] == "centered" or coding.get("neuron") == "ternary"
    return {**coding, **train, **(price if takes else {})}


ACTIVATIONS = st.tuples(CODINGS, TRAINS, PRICED).map(_priced)
WEIGHTS = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 8),
        "group_size": st.sampled_from([None, 1, 4, 50]),
        "symmetric": st.booleans(),
    }
)


@given(
    WEIGHTS,
    ACTIVATIONS,
    st.integers(1, 20),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 10**6),
)
def test_all_modes_agree_bit_for_bit(
    weights: dict[str, Any],
    activations: dict[str, Any],
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if inputs == 1 and "salient_rate" in activations:
        kept = ("bits", "train", "recoding")
        activations = {key: activations[key] for key in kept}
    layer, _ = make(weights, activations, inputs=inputs, outputs=outputs, seed=seed, dtype=dtype)
    x = torch.randn(2, 5, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0, 0] = 0
    x[0, 1] = 3
    merged = layer(x)
    assert merged.dtype == dtype
    for form in ("stepped", "binary", "phase"):
        layer.execution_mode = form  # type: ignore[assignment]
        assert torch.equal(layer(x), merged), form


@given(WEIGHTS, ACTIVATIONS, st.integers(2, 20), st.integers(0, 10**6))
def test_output_is_that_of_decoded_spikes_and_decoded_weights(
    weights: dict[str, Any], activations: dict[str, Any], inputs: int, seed: int
) -> None:
    """Against an independent computation: decode every spike count, multiply in float64."""
    layer, _ = make(weights, activations, inputs=inputs, seed=seed)
    x = torch.randn(6, inputs, generator=torch.Generator().manual_seed(seed))
    codes, thresholds = layer.encode(x)
    layout, neuron = layer.layout(), layer.neuron
    assert neuron is not None
    values = torch.empty_like(x)
    order = layout.order if layout.order is not None else torch.arange(inputs)
    for column, channel in enumerate(order.tolist()):
        group = int(layer.channel_group[channel])
        assert layout.bounds[group] <= column < layout.bounds[group + 1]
        values[:, channel] = neuron.decode(codes[:, column : column + 1], *thresholds[group])[:, 0]
    assert layer.bias is not None
    expected = values.double() @ layer.dense_weight().double().T + layer.bias.double()
    torch.testing.assert_close(
        layer(x).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1e-6)
    )


def test_baseline_is_taken_off_over_the_columns_of_its_group_alone() -> None:
    """All inputs shifted up: a correction over all columns would be far off (relative error 3 in
    the published code).
    """
    activations = {"bits": 8, "salient_rate": 0.3, "salient_steps": 2}
    layer, dense = make({"bits": 8}, activations, inputs=64)
    x = torch.randn(50, 64) + 5
    error = (layer(x) - dense(x)).norm() / dense(x).norm()
    assert float(error) < 0.02


def test_more_steps_lose_less() -> None:
    x = torch.randn(100, 64)
    errors = []
    for steps in (1, 2, 4, 8):
        layer, _ = make({"bits": 8}, {"bits": 3, "steps": steps}, inputs=64)
        exact = x @ layer.dense_weight().T + layer.bias
        errors.append(float((layer(x) - exact).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25), (
        "twice the steps, a quarter of the squared error"
    )


def test_groups_and_steps_are_what_was_chosen() -> None:
    layer, _ = make({"bits": 4}, {"bits": 4, "salient_rate": 0.25, "salient_steps": 3}, inputs=8)
    salient = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    own = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    layer.set_groups(group_of(Selection(salient, own)))
    assert layer.channel_group.tolist() == [0, 1, 0, 0, 2, 0, 0, 0]
    assert layer.channel_steps.tolist() == [1, 3, 1, 1, 3, 1, 1, 1]
    assert layer.average_steps == pytest.approx(1.5)
    layout = layer.layout()
    assert layout.order is not None
    assert layout.order.tolist() == [0, 2, 3, 5, 6, 7, 1, 4]
    assert layout.ranges == [(0, 7), (0, 7), (7, 8)]
    assert layout.weight_groups == [(0, 7), (7, 8)]


def test_weights_only() -> None:
    layer, _ = make({"bits": 4, "group_size": 5}, {"bits": 16})
    x = torch.randn(4, 13)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T + layer.bias)
    with pytest.raises(RequestError, match="does not code its inputs"):
        layer.encode(x)
    with pytest.raises(RequestError, match="no binary execution"):
        set_execution_mode(layer, "binary")


def test_bad_tokens_give_nan_and_leave_the_others_alone() -> None:
    layer, _ = make({"bits": 4}, {"bits": 4})
    x = torch.randn(3, 13)
    good = layer(x)
    x[1, 4] = torch.inf
    assert torch.isnan(layer(x)[1]).all()
    assert torch.equal(layer(x)[[0, 2]], good[[0, 2]])


def test_wide_layers_of_many_bits_stay_exact() -> None:
    """Sums beyond 2**24, where float32 would round: against integers."""
    torch.manual_seed(0)
    dense = nn.Linear(3000, 64, bias=False).requires_grad_(False)
    dense.weight.data.abs_()
    settings = LinearRecipe.model_validate(
        {"weights": {"bits": 8}, "activations": {"bits": 8, "steps": 3}}
    )
    layer = fit(dense, settings)
    x = torch.rand(64, 3000)
    codes, [threshold] = layer.encode(x)
    weights = layer.integer_weights().long()
    charge = codes.long() @ weights.T - threshold.baseline.long() * weights.sum(1)
    assert int(charge.max()) > 2**24
    expected = charge.double() * threshold.theta.double() * layer.weight_scale[:, 0].double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=3e-7, atol=0)
    for form in ("merged", "stepped"):
        layer.execution_mode = form  # type: ignore[assignment]
        assert torch.equal(layer(x), layer(x.clone()))
    assert torch.equal(
        integer_product(codes, weights, 2 * 765 * 255 * 3000).long(), codes.long() @ weights.T
    )


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)])
def test_faster_number_types_do_not_touch_the_integers(bits: tuple[int, int]) -> None:
    layer, _ = make(
        {"bits": bits[0]}, {"bits": bits[1], "salient_rate": 0.1, "salient_steps": 2}, inputs=64
    )
    only_weights, _ = make({"bits": 4}, {"bits": 16}, inputs=64)
    x = torch.randn(9, 64)
    expected, other = layer(x), only_weights(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)
        assert torch.equal(only_weights(x), other)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_newer_precision_interface_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to tell the old setting once the new one was used."""
    layer, _ = make({"bits": 4}, {"bits": 4})
    x = torch.randn(3, 13)
    expected = layer(x)

    def refuse() -> str:
        raise RuntimeError("mixed interfaces")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert torch.equal(layer(x), expected)


def test_loading_other_state_changes_the_layout() -> None:
    recipe = (
        {"bits": 4},
        {"bits": 4, "salient_rate": 0.3, "salient_steps": 2, "saliency": "random"},
    )
    first, second = make(*recipe, seed=1)[0], make(*recipe, seed=2)[0]
    x = torch.randn(5, 13)
    first(x)
    assert not torch.equal(first.channel_group, second.channel_group)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def test_bias_and_every_weight_setting_have_an_effect() -> None:
    layer, dense = make({"bits": 8}, {"bits": 8})
    assert layer.bias is not None
    assert torch.equal(layer.bias, dense.bias)
    assert int(layer.bias.abs().max() > 0)
    symmetric, _ = make({"bits": 4, "symmetric": True}, {"bits": 4})
    assert set(symmetric.weight_zero.unique().tolist()) == {8}
    grouped, _ = make({"bits": 4, "group_size": 5}, {"bits": 4})
    assert grouped.layout().weight_groups == [(0, 5), (5, 10), (10, 13)]
    assert (grouped.weight_scale[:, :3] != 1).all()
    centred, _ = make({"bits": 4}, {"bits": 4, "symmetric": True})
    _, [threshold] = centred.encode(torch.rand(4, 13))
    assert threshold.baseline.flatten().tolist() == [7.0] * 4


def test_inverted_and_random_choices_reach_the_layer() -> None:
    def groups(name: str, seed: int = 0, **activations: Any) -> list[int]:
        dense = nn.Linear(40, 4)
        settings = LinearRecipe.model_validate(
            {"activations": {"bits": 4, "salient_rate": 0.2, "salient_steps": 2, **activations}}
        )
        return fit(
            dense, settings, torch.arange(1, 41).repeat(3, 1).float(), seed, name
        ).channel_group.tolist()

    assert groups("a", saliency="maximum") == [0] * 32 + [2] * 8
    assert groups("a", saliency="maximum", invert=True) == [2] * 8 + [0] * 32
    assert groups("a", saliency="random") == groups("a", saliency="random")
    assert groups("a", saliency="random") != groups("b", saliency="random")
    assert groups("a", saliency="random") != groups("a", 1, saliency="random")


def test_casting_a_model_keeps_scales() -> None:
    layer, _ = make({"bits": 4}, {"bits": 4})
    before = layer.weight_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, before)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


def test_packed_size() -> None:
    layer, dense = make({"bits": 4}, {"bits": 4}, inputs=512, outputs=64)
    assert layer.weight_bytes <= 0.28 * dense.weight.numel() * 2


def test_unknown_form_and_dense_model_are_refused() -> None:
    with pytest.raises(RequestError, match="valid: merged, stepped, binary"):
        set_execution_mode(make({"bits": 4}, {"bits": 4})[0], "sideways")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no spiking layer"):
        set_execution_mode(nn.Linear(2, 2), "binary")


def test_published_top_code_has_the_merged_form_only() -> None:
    layer, _ = make(
        {"bits": 4},
        {
            "bits": 4,
            "neuron": "gif-published",
            "salient_rate": 0.2,
            "salient_steps": 2,
            "saliency": "rms",
        },
    )
    codes, _ = layer.encode(torch.randn(200, 13))
    assert int(codes.max()) == 31
    with pytest.raises(RequestError, match="neuron 'gif-published', .* merged execution only"):
        set_execution_mode(layer, "binary")


@given(
    st.integers(2, 4),
    st.integers(2, 5),
    st.sampled_from([None, 3]),
    st.booleans(),
    st.sampled_from([16, 3]),
    st.tuples(st.integers(2, 17), st.integers(0, 999)),
)
def test_weights_of_several_steps(
    bits: int, steps: int, size: int | None, symmetric: bool, spikes: int, drawn: tuple[int, int]
) -> None:
    """Codes survive packing, salient columns are finer, and all modes agree."""
    inputs, seed = drawn
    weights = {
        "bits": bits,
        "salient_rate": 0.3,
        "salient_steps": steps,
        "saliency": "rms",
        "group_size": size,
        "symmetric": symmetric,
    }
    activations = (
        {"bits": 16} if spikes == 16 else {"bits": spikes, "salient_rate": 0.3, "salient_steps": 2}
    )
    layer, dense = make(weights, activations, inputs=inputs, seed=seed)
    fine = layer.column_steps == steps
    assert int(fine.sum()) == max(1, min(inputs - 1, round(0.3 * inputs))) == layer.salient_columns
    assert fine[0], "the largest channel"
    coding = coding_of(layer.settings, Groups(layer.channel_group, layer.column_steps))
    expected = coding.unstored(dequantize(coding.code(dense.weight, None), coding.groups))
    torch.testing.assert_close(layer.dense_weight(), expected)
    reach = dense.weight.abs().amax(1, keepdim=True) * (2 if symmetric else 1)
    span = (
        (
            dense.weight.amax(1, keepdim=True).clamp(min=0)
            - dense.weight.amin(1, keepdim=True).clamp(max=0)
        )
        if not symmetric
        else reach
    )
    top = steps * (2**bits - 1)
    assert (
        (layer.dense_weight() - dense.weight).abs() <= 1.01 * span / (top - 1 if symmetric else top)
    )[:, fine].all(), "salient columns are finer"
    x = torch.randn(5, inputs)
    merged = layer(x)
    if spikes == 16:
        torch.testing.assert_close(
            merged, x @ layer.dense_weight().T + layer.bias, rtol=1e-4, atol=1e-4
        )
        assert layer.average_steps == pytest.approx(1 + float(fine.float().mean()) * (steps - 1))
    else:
        layer.execution_mode = "binary"
        assert torch.equal(layer(x), merged)
    again = SpikingLinear(inputs, 7, layer.settings)
    again.load_state_dict(layer.state_dict())
    layer.execution_mode = "merged"
    assert torch.equal(again(x), merged)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_straight_through(bits: int, dtype: torch.dtype) -> None:
    """To the weights that the codes stand for, and the output is the same."""
    layer, _ = make({"bits": 4}, {"bits": bits}, inputs=24, outputs=9)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    outer = torch.randn_like(y)
    (y * outer).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, (outer.float() @ layer.dense_weight()).to(dtype))
    assert all(buffer.grad is None for buffer in layer.buffers())


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    layer, _ = make({"bits": 4}, {"bits": 4})
    x = torch.randn(5, 13, requires_grad=True)
    with torch.no_grad():
        expected = layer(x)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((7,), 5.0))
