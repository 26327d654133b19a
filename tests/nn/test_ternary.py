from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.algorithms.gptq import Target, fit_layer
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.core.errors import RequestError
from spikellm.kernels.torch.product import sum_of_chosen
from spikellm.nn.channels import Groups, Sample, salient_columns
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.formats.ternary import plane_sizes
from spikellm.nn.linear import SpikingLinear
from spikellm.recipe import LinearRecipe

TERNARY = {"format": "ternary"}


def fit(
    weights: dict[str, Any],
    activations: dict[str, Any] | None = None,
    *,
    inputs: int = 23,
    seed: int = 0,
    steps: Any = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator) @ torch.randn(
        inputs, inputs, generator=generator
    )
    dense = torch.nn.Linear(inputs, 6).requires_grad_(False)
    dense.weight.data = torch.randn(6, inputs, generator=generator)
    settings = LinearRecipe.model_validate(
        {"weights": weights, "activations": activations or {"bits": 16}}
    )
    groups = Groups(torch.zeros(inputs, dtype=torch.uint8), steps)
    return (
        fit_layer(
            "layer", dense, settings, groups, Target((x.T @ x).double()), GptqOptions(**options)
        )[0],
        dense,
        x,
    )


def relative_error(layer: Any, dense: Any, x: torch.Tensor) -> float:
    return float((layer(x) - dense(x)).square().sum() / dense(x).square().sum())


@given(
    st.sampled_from([1.0, 1.4, 2.0, 3.3]),
    st.sampled_from([None, 5]),
    st.integers(1, 30),
    st.booleans(),
    st.integers(0, 999),
)
def test_planes_hold_the_codes_and_additions_give_the_product(
    budget: float, size: int | None, inputs: int, order: bool, seed: int
) -> None:
    layer, _, _ = fit(
        {**TERNARY, "budget": budget, "group_size": size},
        inputs=inputs,
        seed=seed,
        activation_order=order,
    )
    assert layer.format.name == "ternary"
    q = layer.integer_weights()
    steps = (
        layer.column_steps
        if layer.layout().order is None
        else layer.column_steps[layer.layout().order]
    )
    assert (q.abs() <= steps).all()
    assert int(layer.column_steps.sum()) == max(round(budget * inputs), inputs)
    assert layer.average_steps == pytest.approx(float(layer.column_steps.float().mean()))
    assert layer.additive_share == 1.0
    integers = torch.randint(
        -100, 100, (4, inputs), generator=torch.Generator().manual_seed(seed)
    ).float()
    merged = layer(integers)
    torch.testing.assert_close(
        merged, integers @ layer.dense_weight().T + layer.bias, rtol=1e-4, atol=1e-3
    )
    for form in ("stepped", "binary"):
        set_execution_mode(layer, form)  # type: ignore[arg-type]
        assert torch.equal(layer(integers), merged), "integers: bit for bit"
        x = torch.randn(4, inputs)
        torch.testing.assert_close(
            layer(x), x @ layer.dense_weight().T + layer.bias, rtol=1e-4, atol=1e-4
        )
    sizes = layer.format.sizes_of(layer.state_dict())
    again = SpikingLinear(inputs, 6, layer.settings, sizes=sizes)
    again.load_state_dict(layer.state_dict())
    assert again.validation_error() is None
    assert torch.equal(again(integers), merged)


def test_no_product_in_the_forms_by_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only multiplications left are by scales, after the sums."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setenv(
        "SPIKELLM_KERNELS", "torch"
    )  # whose products are counted; the native kernel makes none
    layer, _, x = fit({**TERNARY, "budget": 1.5})
    with FlopCounterMode(display=False) as merged:
        layer(x)
    set_execution_mode(layer, "stepped")
    with FlopCounterMode(display=False) as stepped:
        layer(x)
    assert merged.get_total_flops() > 0
    assert stepped.get_total_flops() == 0


def test_sum_of_chosen_with_rows_that_choose_nothing() -> None:
    chosen = torch.tensor(
        [[False, False], [True, True], [False, False], [False, True], [False, False]]
    )
    assert sum_of_chosen(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), chosen).tolist() == [
        [0, 3, 0, 2, 0],
        [0, 7, 0, 4, 0],
    ]


@given(st.integers(1, 3), st.sampled_from(["merged", "stepped", "binary"]), st.integers(0, 99))
def test_coded_inputs_on_ternary_weights_stay_exact(bits: int, form: str, seed: int) -> None:
    layer, _, x = fit({**TERNARY, "budget": 1.6}, {"bits": bits, "steps": 2}, seed=seed)
    codes, [threshold] = layer.encode(x[:9])
    q = layer.integer_weights().long()
    charge = codes.long() @ q.T - 0  # by weight group below, since each has its scale
    expected = torch.zeros(9, 6, dtype=torch.float64)
    for segment in layer.layout().segments:
        part = slice(segment.start, segment.stop)
        charge = (codes[:, part].long() - threshold.baseline.long()) @ q[:, part].T
        expected += (
            charge.double()
            * threshold.theta.double()
            * layer.weight_scale[:, segment.weight_group].double()
        )
    set_execution_mode(layer, form)  # type: ignore[arg-type]
    torch.testing.assert_close(
        layer(x[:9]).double(), expected + layer.bias.double(), rtol=1e-5, atol=1e-5
    )


@given(st.sampled_from([1.0, 1.4]), st.sampled_from([None, 5]), st.sampled_from([4, 16]))
def test_scales_of_16_bits_are_the_layer_whose_scales_have_these_values(
    budget: float, size: int | None, bits: int
) -> None:
    weights, inputs = {**TERNARY, "budget": budget, "group_size": size}, {"bits": bits}
    short, _, x = fit({**weights, "scale_bits": 16}, inputs)
    long, _, _ = fit(weights, inputs)
    assert torch.equal(short.integer_weights(), long.integer_weights())
    assert short.weight_scale.dtype == torch.bfloat16
    assert long.weight_bytes - short.weight_bytes == 2 * short.weight_scale.numel()
    torch.testing.assert_close(short.weight_scale.float(), long.weight_scale, rtol=2**-8, atol=0)
    long.weight_scale.copy_(short.weight_scale)
    long.bias.copy_(short.bias)  # those of dense layers are random
    assert torch.equal(short(x), long(x))
    assert torch.equal(short.double().weight_scale, long.weight_scale.bfloat16())


def test_feedback_fitting_and_steps_each_lower_the_error() -> None:
    def mean(weights: dict[str, Any], **options: Any) -> float:
        return (
            sum(relative_error(*fit(weights, inputs=64, seed=seed, **options)) for seed in range(5))
            / 5
        )

    one = mean(TERNARY, rounds=1)
    assert mean(TERNARY) < one, "scales refitted"
    assert mean(TERNARY, descents=4) < mean(TERNARY), "codes decided again, given all others"
    assert mean({"bits": 4}, descents=4) < mean({"bits": 4})
    assert mean({**TERNARY, "budget": 1.4}) < mean(TERNARY)
    assert (
        mean({**TERNARY, "budget": 2.4})
        < mean({**TERNARY, "budget": 1.7})
        < mean({**TERNARY, "budget": 1.4})
    )
    assert mean({"bits": 4}) < mean({"bits": 3}) < mean({"bits": 2})
    rate = {"format": "partly-binary", "bits": 8}
    assert mean({**rate, "salient_rate": 0.2}) < mean({**rate, "salient_rate": 0.05})
    assert mean({**TERNARY, "budget": 1.4}) < mean({**rate, "salient_rate": 0.05}), (
        "at 1.4 and 1.35 steps"
    )


def test_allocation_beats_its_controls() -> None:
    """Inputs of very different size: steps for the salient columns help, for the others hardly."""
    generator = torch.Generator().manual_seed(0)
    inputs = 80
    x = torch.randn(600, inputs, generator=generator) * torch.exp(
        torch.randn(inputs, generator=generator)
    )
    x = x + 0.3 * x.roll(1, dims=1)
    dense = torch.nn.Linear(inputs, 24).requires_grad_(False)
    dense.weight.data = torch.randn(24, inputs, generator=generator)

    def error(**weights: Any) -> float:
        settings = LinearRecipe.model_validate(
            {"weights": {**TERNARY, **weights}, "activations": {"bits": 16}}
        )
        steps = (
            salient_columns(Sample(x, dense.weight), settings, 0, "layer")
            if "salient_rate" in weights
            else None
        )
        groups = Groups(torch.zeros(inputs, dtype=torch.uint8), steps)
        layer, _ = fit_layer(
            "layer", dense, settings, groups, Target((x.T @ x).double()), GptqOptions()
        )
        assert layer.average_steps == pytest.approx(1.4)
        return relative_error(layer, dense, x)

    fixed = {"salient_rate": 0.4, "salient_steps": 2}
    second_order = error(**fixed)
    assert second_order < error(**fixed, saliency="random") < error(**fixed, invert=True)
    assert error(budget=1.4) < second_order


def test_partly_binary_counts_and_keeps_its_mask() -> None:
    layer, _, x = fit(
        {"format": "partly-binary", "bits": 8, "salient_rate": 0.1, "group_size": 8}, inputs=40
    )
    assert layer.salient_codes.shape == (24,)
    assert layer.additive_share == pytest.approx(0.9)
    assert layer.average_steps == pytest.approx(1.7)
    weight = layer.dense_weight()
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)
    again = SpikingLinear(40, 6, layer.settings, sizes=(24,))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    again.salient_mask[0, 0] ^= 1
    assert "salient_mask marks" in str(again.validation_error())
    with pytest.raises(RequestError, match="no binary execution"):
        set_execution_mode(layer, "binary")


def test_damage_is_seen() -> None:
    layer, _, _ = fit({**TERNARY, "budget": 1.4})
    layer.spikes_plus[0, 0] = layer.spikes_minus[0, 0] = 255
    assert layer.validation_error() == "spikes_plus and spikes_minus fire at once"
    layer.column_steps[0] += 1
    assert "column_steps" in str(layer.validation_error())


def test_dead_channels_and_rows() -> None:
    dense = torch.nn.Linear(5, 3).requires_grad_(False)
    dense.weight.data[1] = 0
    groups = Groups(torch.zeros(5, dtype=torch.uint8), None)
    for weights in (
        TERNARY,
        {"bits": 2},
        {"format": "partly-binary", "bits": 8, "salient_rate": 0.2},
    ):
        settings = LinearRecipe.model_validate({"weights": weights, "activations": {"bits": 16}})
        layer = fit_layer(
            "layer",
            dense,
            settings,
            groups,
            Target(torch.zeros(5, 5, dtype=torch.float64)),
            GptqOptions(),
        )[0]
        assert torch.isfinite(layer(torch.randn(2, 5))).all()


def test_plane_sizes() -> None:
    assert plane_sizes(torch.tensor([1, 3, 1, 2])) == (4, 2, 1)


def test_phases_are_of_inputs() -> None:
    layer, _, x = fit({**TERNARY, "budget": 1.4})
    with pytest.raises(RequestError, match="no layer codes its inputs"):
        set_execution_mode(layer, "phase")
    both, _, x = fit({**TERNARY, "budget": 1.4}, {"bits": 4, "train": "centered"})
    merged = both(x)
    for mode in ("stepped", "binary", "phase"):
        set_execution_mode(both, mode)
        assert torch.equal(both(x), merged)
