from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.neurons import make_neuron
from spikellm.quantization.rounding import half_up
from spikellm.quantization.thresholds import (
    coded_range,
    threshold_for_range,
    token_mean,
    token_range,
)

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    st.lists(FINITE, min_size=1, max_size=20),
    st.integers(2, 60),
    st.sampled_from(["asymmetric", "symmetric", "signed"]),
)
def test_every_value_is_within_half_a_step(values: list[float], top: int, kind: str) -> None:
    x = torch.tensor([values])
    neuron = make_neuron(
        "ternary" if kind == "signed" else "gif", 2 if kind == "signed" else 1
    )  # L = 1, so T is the top code
    theta, baseline = threshold_for_range(
        *token_range(x), top, symmetric=kind == "symmetric", signed=kind == "signed"
    )
    code = neuron.encode(x, theta, baseline, top)
    assert float(theta) > 0
    assert float(baseline) == int(baseline)
    assert 0 <= float(baseline) <= top
    # the baseline is rounded to a whole code, so the very ends of an asymmetric range may be
    # clipped by half a step more
    bound = (1.0 if kind == "asymmetric" else 0.5) * float(theta) * (1 + 1e-4)
    assert float((neuron.decode(code, theta, baseline) - x).abs().max()) <= bound


@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"signed": True}])
def test_silent_tokens_are_exactly_zero(kind: dict[str, bool]) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1e-44, 0.0, -1e-44]])
    neuron = make_neuron("ternary", 2) if kind.get("signed") else make_neuron("gif", 2)
    theta, baseline = threshold_for_range(*token_range(x), 3 * neuron.levels, **kind)
    assert torch.isfinite(theta).all()
    assert neuron.decode(neuron.encode(x, theta, baseline, 3), theta, baseline).abs().max() == 0


@given(
    st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda v: abs(v) > 1e-30), st.integers(1, 255)
)
def test_constant_tokens_are_kept(value: float, top: int) -> None:
    x = torch.full((1, 5), value)
    theta, baseline = threshold_for_range(*token_range(x), top)
    neuron = make_neuron("gif", 1)
    decoded = neuron.decode(neuron.encode(x, theta, baseline, top), theta, baseline)
    torch.testing.assert_close(decoded, x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_tokens_are_not_hidden(bad: float) -> None:
    x = torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 3.0]])
    theta, _ = threshold_for_range(*token_range(x), 15)
    assert torch.isnan(theta).flatten().tolist() == [True, False]


def test_huge_ranges_do_not_overflow() -> None:
    x = torch.tensor([[3e38, -3e38]])
    theta, _ = threshold_for_range(*token_range(x), 15)
    assert torch.isfinite(theta).all()


def test_no_channels() -> None:
    low, high = token_range(torch.zeros(3, 0))
    assert low.shape == high.shape == (3, 1)
    assert threshold_for_range(low, high, 15).theta.tolist() == [[1.0]] * 3


@given(st.floats(-1e6, 1e6, width=32))
def test_half_up_against_rational_arithmetic(value: float) -> None:
    from fractions import Fraction

    assert int(half_up(torch.tensor(value))) == math.floor(Fraction(value) + Fraction(1, 2))


@given(
    st.lists(FINITE, min_size=1, max_size=40),
    st.integers(0, 2**31),
    st.sampled_from([0.0625, 2.0, 15.9375]),
)
def test_a_mean_is_the_same_in_whatever_order(
    values: list[float], seed: int, factor: float
) -> None:
    x = torch.tensor([values])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    mean = token_mean(x)
    assert torch.equal(mean, token_mean(x[:, order]))
    assert torch.equal(mean, token_mean(-x))
    wide = torch.cat([x, torch.zeros(1, 7)], 1)
    assert torch.equal(mean, token_mean(wide, len(values))), "channels set to zero do not count"
    expected = x.double().abs().mean(-1, keepdim=True)
    # whole parts of the largest are cut off below
    assert float((mean - expected).abs()) <= float(x.abs().max()) * 2.0**-23
    low, high = coded_range(x, factor, "mean")
    assert torch.equal(low, -high)
    torch.testing.assert_close(high, (mean * factor).clamp(max=torch.finfo(torch.float32).max))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_tokens_have_no_mean(bad: float) -> None:
    x = torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    theta, _ = threshold_for_range(*coded_range(x, 2.0, "mean"), 1, signed=True)
    assert torch.isnan(theta).flatten().tolist() == [True, False, False]
    assert theta[1:].flatten().tolist() == [4.0, 1.0]
    assert token_mean(torch.zeros(3, 0)).shape == (3, 1)
    huge = torch.full((1, 4), 3e38)
    assert torch.isfinite(threshold_for_range(*coded_range(huge, 4.0, "mean"), 1, signed=True)[0])
