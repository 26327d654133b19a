"""One token must not rule a sum."""

from __future__ import annotations

import pytest
import torch

from spikellm.data.shards import shard_windows
from spikellm.observers.input_stats import SampledInputs, TokenSample
from spikellm.observers.token_weights import SamplePlan, TokenWeights, token_scale, weighed
from spikellm.recipe.calibration import CalibrationRecipe


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
    sample = TokenSample(SamplePlan(len(x), len(x), weights=TokenWeights(weights)))
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
    samples = SampledInputs(dict(layers), SamplePlan(64, 64, weights=TokenWeights("robust")))
    x = massive()
    with samples.hooks():
        for layer in layers.values():
            layer(x)
    assert samples["q"] is samples["k"]
    assert torch.equal(samples["q"], weighed(x, "robust"))


def test_widths_of_ranges_are_those_of_tokens_as_they_came() -> None:
    x = massive()
    sample = TokenSample(SamplePlan(2 * len(x), 8, weights=TokenWeights("robust"), widths=True))
    sample.update(x)
    sample.update(-x)
    sample.all_gather()
    expected = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)).repeat(2)
    assert torch.equal(sample.widths(), expected), "of all tokens, not only of those sampled"


def test_tokens_that_open_every_window_weigh_more_where_weights_are_fitted() -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    weights = TokenWeights("equal", seqlen=4, opening=1, opening_scale=3.0)
    assert weights.scale(x) is None, "elsewhere they are ordinary ones"
    assert weights._replace(opening=0).scale(x, fitted=True) is None
    scale = weights.scale(x, fitted=True)
    assert scale is not None
    assert scale.flatten().tolist() == [3, 1, 1, 1] * 3
    robust = weights._replace(rule="robust").scale(x, fitted=True)
    ordinary = token_scale(x, "robust")
    assert robust is not None
    assert ordinary is not None
    assert torch.equal(robust, ordinary * scale)

    sample = TokenSample(SamplePlan(12, 12, weights=weights))
    sample.update(x, hessian=True)
    assert torch.equal(sample.tokens(), x)
    assert sample.hessian is not None
    assert torch.allclose(sample.hessian, ((x * scale).T @ (x * scale)).double())


def test_how_windows_open() -> None:
    windows = torch.tensor([[1, 7, 3, 4], [1, 7, 5, 4], [1, 7, 3, 4]])
    assert shard_windows(windows, 1).opening == 2
    assert shard_windows(windows[:, 2:], 1).opening == 0
    assert shard_windows(windows[:1], 1).opening == 0, "one window says nothing"
    recipe = CalibrationRecipe(opening_weight=16.0)
    found = TokenWeights.of(recipe, shard_windows(windows, 1))
    assert found == TokenWeights("equal", 4, 2, 4.0)
