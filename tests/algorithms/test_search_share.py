"""The share of its range that a token's inputs are coded in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layers import fit
from spikellm.algorithms.channel_choice import search_share
from spikellm.core.errors import RecipeError
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.validation import validation_error
from spikellm.quantization.thresholds import FULL_RANGE, part_of_range, token_mean
from spikellm.recipe import ActivationRecipe, LinearRecipe
from spikellm.recipe.load import load_recipe


def settings(**more: Any) -> ActivationRecipe:
    return ActivationRecipe.model_validate({"bits": 4, "search_range": True, **more})


def test_normal_inputs_lose_least_in_a_part_of_their_range() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(512, 256), torch.randn(64, 256)
    group = torch.zeros(256, dtype=torch.uint8)
    share = search_share(settings(), group, x, weight)
    assert share < FULL_RANGE

    def loss(share: int) -> float:
        error = InputCoder(settings(), group, share).values(x) - x
        return float((error @ weight.T).square().sum())

    assert loss(share) < 0.9 * loss(FULL_RANGE)
    assert loss(share) == min(loss(one) for one in range(FULL_RANGE, FULL_RANGE // 2, -2))


def test_two_valued_inputs_keep_all_of_it() -> None:
    x = torch.randint(0, 2, (64, 32)).float()
    group = torch.zeros(32, dtype=torch.uint8)
    assert search_share(settings(), group, x, torch.randn(8, 32)) == FULL_RANGE


def test_ends_are_scaled_exactly() -> None:
    low, high = torch.tensor([-3.0]), torch.tensor([5.0])
    assert part_of_range(low, high) == (low, high)
    assert [float(end) for end in part_of_range(low, high, 48 / 64)] == [-2.25, 3.75]


def test_the_share_is_state_and_is_checked() -> None:
    torch.manual_seed(0)
    layer = fit(nn.Linear(16, 8), LinearRecipe(activations=settings()))
    assert layer.range_share == 53
    other = fit(nn.Linear(16, 8), LinearRecipe(activations=settings()))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(layer(x), other(x))
    other.input_range.fill_(32)
    assert not torch.equal(layer(x), other(x)), "and it has an effect at once"
    other.input_range.fill_(0)
    assert "input_range holds 0" in str(validation_error(other))


def test_layers_without_a_search_have_no_such_buffer() -> None:
    layer = fit(nn.Linear(16, 8), LinearRecipe())
    assert "input_range" not in layer.state_dict()


def test_heads_take_no_search() -> None:
    with pytest.raises(RecipeError, match="key.search_range is for linear layers"):
        load_recipe(
            "rtn-w4a4", ["attention={key: {bits: 4, search_range: true}, value: {bits: 4}}"]
        )


FEW: dict[str, Any] = {"bits": 2, "neuron": "ternary", "symmetric": True, "search_range": True}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_levels_take_the_multiple_of_the_mean_that_loses_least(steps: int) -> None:
    torch.manual_seed(0)
    few = ActivationRecipe.model_validate({**FEW, "steps": steps, "threshold_from": "mean"})
    x, weight = torch.randn(512, 256), torch.randn(64, 256)
    x[:, 3] *= 5  # an outlier channel says nothing of the others
    group = torch.zeros(256, dtype=torch.uint8)

    def loss(factor: int, settings: ActivationRecipe = few) -> float:
        error = InputCoder(settings, group, factor).values(x) - x
        return float((error @ weight.T).square().sum())

    found = search_share(few, group, x, weight)
    assert loss(found) <= 1.001 * min(loss(factor) for factor in range(8, 256, 4))
    plain = ActivationRecipe.model_validate({**FEW, "steps": steps})
    if steps < 4:
        assert loss(found) < 0.9 * loss(search_share(plain, group, x, weight), plain)


def test_the_multiple_is_state_and_is_checked() -> None:
    torch.manual_seed(0)
    recipe = LinearRecipe(activations=ActivationRecipe(**FEW, threshold_from="mean"))
    layer, other = (fit(nn.Linear(16, 8), recipe) for _ in range(2))
    layer.input_range.fill_(200)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(layer(x), other(x))
    assert validation_error(layer, "layer") is None
    coded = InputCoder(recipe.activations, layer.channel_group, layer.range_share).values(x)
    codes, [(theta, _)] = layer.encode(x)
    assert torch.equal(coded, codes * theta)
    assert torch.equal(theta, (token_mean(x) * 12.5))
    layer.input_range.fill_(0)
    assert "expected 1 to 255" in str(validation_error(layer, "layer"))
