"""Fitting planes of ±1 by GPTQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikellm.algorithms.gptq_layer import Target, fit_layer
from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.nn.channels import Groups
from spikellm.quantization.bcq import Rounding, fit_scales, plane_errors
from spikellm.quantization.powers import terms_of
from spikellm.recipe import LinearRecipe

INPUTS = 96


def problem(seed: int = 0) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5
    x = torch.randn(600, INPUTS, generator=generator) @ (mixing + torch.eye(INPUTS))
    dense = nn.Linear(INPUTS, 24, bias=False).requires_grad_(False)
    dense.weight.data = torch.randn(24, INPUTS, generator=generator)
    return dense, x


def error(weights: dict[str, Any], **options: Any) -> float:
    """Squared error of a fitted layer's output, as a share of the output."""
    dense, x = problem()
    settings = LinearRecipe.model_validate({"weights": weights, "activations": {"bits": 16}})
    layer, _ = fit_layer(
        "layer",
        dense,
        settings,
        Groups(torch.zeros(INPUTS, dtype=torch.uint8), None),
        Target((x.T @ x).double()),
        GptqOptions(**options),
    )
    assert layer.validation_error() is None
    return float((layer(x) - dense(x)).square().sum() / dense(x).square().sum())


BCQ = {"format": "bcq", "group_size": 48}


def test_two_planes_beat_four_even_levels_and_are_beaten_by_three() -> None:
    even = error({"bits": 2, "group_size": 48}, search_range=True, descents=8)
    two, three = error(BCQ, descents=8), error({**BCQ, "planes": 3}, descents=8)
    assert three < two < 0.95 * even
    assert two < error(BCQ), "codes decided again"
    assert error(BCQ) < error(BCQ, rounds=1), "scales fitted in turn"


def test_powers_of_two_cost_little() -> None:
    free, three, one = (error({**BCQ, "scale_terms": terms}) for terms in (None, 3, 1))
    assert 0.9 * free < three < 1.1 * free
    assert three < one < 1.6 * free


def test_a_budget_buys_planes_where_they_gain_most() -> None:
    mixed = error({"format": "bcq", "budget": 1.5, "group_size": 48})
    assert error({**BCQ, "planes": 2}) < mixed < error({**BCQ, "planes": 1})


def test_billm_lies_between_one_plane_and_two_and_its_published_search_is_worse() -> None:
    repaired = error({"format": "billm", "group_size": 48})
    published = error({"format": "billm", "group_size": 48, "search": "scores"})
    assert error({**BCQ, "planes": 2}) < repaired < published
    assert repaired < error({**BCQ, "planes": 1})


def test_scales_are_fitted_to_the_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (2, 5, 64), generator=generator) * 2.0 - 1
    true = torch.tensor([[0.75, 0.25]]).expand(5, 2)
    weight = torch.einsum("poc,op->oc", signs, true)
    found = fit_scales(weight, torch.ones(64), 2, Rounding())
    assert torch.allclose(found.sort(1, descending=True).values, true, atol=1e-5)


def test_more_planes_err_less() -> None:
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    errors = plane_errors(weight, torch.ones(40), 4).sum(1)
    assert bool((errors[1:] < 0.6 * errors[:-1]).all())


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_stored_scales_have_so_many_terms(terms: int) -> None:
    dense, x = problem()
    settings = LinearRecipe.model_validate(
        {"weights": {**BCQ, "scale_terms": terms}, "activations": {"bits": 16}}
    )
    groups = Groups(torch.zeros(INPUTS, dtype=torch.uint8), None)
    target = Target((x.T @ x).double())
    layer, _ = fit_layer("layer", dense, settings, groups, target, GptqOptions(descents=3))
    assert int(terms_of(layer.weight_scale).max()) <= terms


def test_a_layer_without_inputs_or_weights_is_fitted() -> None:
    for weight, x in ((torch.zeros(4, 12), torch.randn(50, 12)), (torch.randn(4, 12), None)):
        dense = nn.Linear(12, 4, bias=False).requires_grad_(False)
        dense.weight.data = weight
        hessian = torch.zeros(12, 12).double() if x is None else (x.T @ x).double()
        for kind in ({"format": "bcq"}, {"format": "billm"}):
            settings = LinearRecipe.model_validate({"weights": kind, "activations": {"bits": 16}})
            groups = Groups(torch.zeros(12, dtype=torch.uint8), None)
            layer, _ = fit_layer("layer", dense, settings, groups, Target(hessian), GptqOptions())
            assert bool(torch.isfinite(layer.dense_weight()).all())
            assert layer.validation_error() is None
