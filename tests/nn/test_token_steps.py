"""Linear layers in which massive tokens take more steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layers import BEYOND, fit
from native import both, needs_compiler
from spikellm.core.errors import RecipeError
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.validation import validation_error
from spikellm.profiling.operations import products_of
from spikellm.profiling.population import layer_population
from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.recipe.load import load_recipe

KINDS: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 4, "symmetric": True},
    {"bits": 2, "neuron": "ternary", "symmetric": True},
    {"bits": 4, "search_range": True},
    {"bits": 4, "salient_rate": 0.2, "salient_steps": 2, "saliency": "rms"},
]


def layer_with(kind: dict[str, Any], token_steps: int = 8, **weights: Any) -> SpikingLinear:
    torch.manual_seed(0)
    settings = LinearRecipe.model_validate(
        {"weights": {"bits": 4, **weights}, "activations": {**kind, "token_steps": token_steps}}
    )
    return fit(nn.Linear(40, 6), settings, sample=torch.randn(50, 40))


def inputs() -> torch.Tensor:
    """Tokens of which the second and the last are massive."""
    x = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) - 0.5
    x[[1, 4]] *= 50 * BEYOND
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_only_massive_tokens_change_and_each_by_itself(kind: dict[str, Any]) -> None:
    plain, layer, x = layer_with(kind, 0), layer_with(kind), inputs()
    y, before = layer(x), plain(x)
    assert torch.equal(y[[0, 2, 3]], before[[0, 2, 3]])
    for token in range(len(x)):
        assert torch.equal(layer(x[token : token + 1])[0], y[token]), "it needs no other token"


def test_massive_tokens_lose_less_by_their_steps() -> None:
    x = (torch.rand(100, 40, generator=torch.Generator().manual_seed(1)) - 0.5) * 100
    errors = []
    for steps in (0, 2, 8):
        layer = layer_with(KINDS[0], steps)
        exact = x @ layer.dense_weight().T + layer.bias
        errors.append(float((layer(x) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[0] / errors[2] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_the_same_codes(kind: dict[str, Any]) -> None:
    layer, x = layer_with(kind), inputs()
    coder = InputCoder(
        layer.settings.activations, layer.channel_group, layer.range_share, layer.massive
    )
    codes, thresholds = layer.encode(x)
    order, layout = layer.layout().order, layer.layout()
    stored = coder.values(x) if order is None else coder.values(x)[:, order]
    for group, (theta, baseline) in enumerate(thresholds):
        part = slice(layout.bounds[group], layout.bounds[group + 1])
        torch.testing.assert_close(stored[:, part], theta * (codes[:, part] - baseline))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_show_the_counts_of_the_reference(
    kind: dict[str, Any], native_kernels: None
) -> None:
    layer, x = layer_with(kind, 7), inputs()
    trains: list[SpikeTrain] = []
    with observe_spikes(trains.append):
        found, expected = both(layer, x)
    assert torch.equal(found, expected)
    native, reference = trains
    assert torch.equal(native.codes, reference.codes)
    assert native.codes.dtype == reference.codes.dtype
    assert native.steps.shape == native.codes.shape
    assert native.steps[1].eq(7).all()
    assert native.steps[0].max() <= 2


def test_steps_are_counted_by_token() -> None:
    layer, x = layer_with(KINDS[-1]), inputs()
    massive = layer.massive
    assert massive is not None
    assert massive.share == 0.25
    ordinary = float(layer.channel_steps.float().mean())
    assert layer.average_steps == pytest.approx(0.75 * ordinary + 0.25 * 8)
    trains: list[SpikeTrain] = []
    with observe_spikes(trains.append):
        layer(x)
    measured = 0.6 * ordinary + 0.4 * 8
    assert products_of(layer, trains[0]) == {(4, 4): pytest.approx(measured)}
    population = layer_population("layer", layer, x)
    assert population.code_steps.amin(1).tolist() == [1, 8, 1, 1, 8]
    assert len(population.of_token(1)) == 8 * 15
    assert len(population.of_token(0)) == 2 * 15
    total = sum(plane.int() << place for plane, place in population.planes())
    assert torch.equal(total, population.fired)
    assert population.codes.max() > 30


def test_the_threshold_is_state_and_is_checked() -> None:
    layer, other = layer_with(KINDS[0]), layer_with(KINDS[0])
    other.token_threshold.fill_(torch.inf)
    assert other.massive is None
    x = inputs()
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert validation_error(other) is None
    assert torch.equal(other.to(torch.bfloat16)(x), layer.to(torch.bfloat16)(x))
    other.token_threshold.fill_(-1)
    assert "token_threshold and token_share hold -1" in str(validation_error(other))
    assert "token_threshold" not in layer_with(KINDS[0], 0).state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("activations={bits: 4, token_factor: 3}", "no effect while token_steps is 0"),
        ("activations={bits: 4, steps: 4, token_steps: 4}", "token_steps to 5"),
        ("activations={bits: 16, token_steps: 4}", "no effect: bits is 16"),
        ("activations={bits: 8, steps: 2, token_steps: 17}", "less than or equal to 16"),
        (
            "attention={query: {bits: 4, token_steps: 8}, key: {bits: 4}, value: {bits: 4}}",
            "query.token_steps has no effect",
        ),
        (
            "attention={key_axis: sequence, key: {bits: 4, token_steps: 8}, value: {bits: 4}}",
            "key.token_steps needs ranges of K over a token",
        ),
    ],
)
def test_what_has_no_effect_is_refused(settings: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("rtn-w4a4", [settings])


def test_learned_scales_are_refused() -> None:
    with pytest.raises(RecipeError, match="omniquant goes on scaling"):
        load_recipe("omniquant-w4a4", ["activations.token_steps=8"])


def test_old_recipes_keep_their_fields() -> None:
    assert (
        not {"token_steps", "token_factor", "token_rate"} & ActivationRecipe().model_dump().keys()
    )
    assert ActivationRecipe(token_steps=8).model_dump()["token_steps"] == 8
