"""One token must not rule a sum."""

from __future__ import annotations

import pytest
import torch

from spikellm.observers.input_stats import SampledInputs, TokenSample
from spikellm.observers.token_weights import SamplePlan, token_scale, weighed


def massive(tokens: int = 64, channels: int = 8) -> torch.Tensor:
    x = torch.randn(tokens, channels)
    x[0] *= 300
    return x


def test_no_token_weighs_more_than_the_median() -> None:
    x = massive()
    norms = torch.linalg.vector_norm(weighed(x, "robust"), dim=-1)
    before = torch.linalg.vector_norm(x, dim=-1)
    assert float(norms.max()) <= float(before.median()) * (1 + 1e-6)
    small = before <= before.median()
    assert torch.equal(weighed(x, "robust")[small], x[small]), "others stay as they are"


def test_equal_weights_change_nothing() -> None:
    x = massive()
    assert token_scale(x, "equal") is None
    assert torch.equal(weighed(x, "equal"), x)


def test_tokens_of_zeros_stay_zeros() -> None:
    x = torch.zeros(5, 3)
    assert torch.equal(weighed(x, "robust"), x)
    assert token_scale(torch.zeros(0, 3), "robust") is None


@pytest.mark.parametrize("weights", ["equal", "robust"])
def test_hessian_and_sample_are_weighed_alike(weights: str) -> None:
    x = massive()
    sample = TokenSample(SamplePlan(len(x), len(x), weights=weights))
    sample.update(x, hessian=True)
    expected = weighed(x, weights)
    assert torch.equal(sample.tokens(), expected)
    assert sample.hessian is not None
    torch.testing.assert_close(sample.hessian, (expected.T @ expected).double())
    share = float(x[0].square().sum() / x.square().sum())
    ruled = float(expected[0].square().sum() / expected.square().sum())
    assert share > 0.9
    assert (ruled < 0.05) == (weights == "robust")


def test_layers_of_one_input_share_a_weighed_sample() -> None:
    layers = {name: torch.nn.Linear(8, 4) for name in "qk"}
    samples = SampledInputs(dict(layers), SamplePlan(64, 64, weights="robust"))
    x = massive()
    with samples.hooks():
        for layer in layers.values():
            layer(x)
    assert samples["q"] is samples["k"]
    assert torch.equal(samples["q"], weighed(x, "robust"))


def test_widths_of_ranges_are_those_of_tokens_as_they_came() -> None:
    x = massive()
    sample = TokenSample(SamplePlan(2 * len(x), 8, weights="robust", widths=True))
    sample.update(x)
    sample.update(-x)
    sample.all_gather()
    expected = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).repeat(2)
    assert torch.equal(sample.widths(), expected), "of all tokens, not only of those sampled"
