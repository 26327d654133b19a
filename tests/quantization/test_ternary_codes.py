from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.ternary import refit_scales, search_scale, step_errors, ternary_codes
from spikellm.saliency.allocation import spend


@given(st.integers(1, 5), st.integers(0, 999))
def test_codes_are_the_nearest(steps: int, seed: int) -> None:
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
    scale = torch.rand(4, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    codes = ternary_codes(weight, scale, steps)
    every = torch.arange(-steps, steps + 1).view(-1, 1, 1) * scale
    torch.testing.assert_close((weight - codes * scale).abs(), (weight - every).abs().amin(0))


def test_searched_scale_beats_the_usual_guesses() -> None:
    weight, importance = (
        torch.randn(20, 300, generator=torch.Generator().manual_seed(0)),
        torch.rand(300),
    )
    for steps in (1, 2, 4):
        scale = search_scale(weight, importance, steps)

        def error(s: torch.Tensor, steps: int = steps) -> torch.Tensor:
            return (weight - s * ternary_codes(weight, s, steps)).square() @ importance

        for guess in (
            weight.abs().amax(1, keepdim=True) / steps,
            weight.abs().mean(1, keepdim=True),
        ):
            assert (error(scale) <= error(guess) * 1.02).all()
    assert (search_scale(torch.zeros(3, 5), torch.ones(5), 1) > 0).all(), "a dead row"


def test_refitted_scales_solve_the_least_squares_problem() -> None:
    """Against numpy-like normal equations of each row, all groups at once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 9, generator=generator) @ torch.randn(9, 9, generator=generator)
    hessian, groups = x.T @ x, [(0, 4), (4, 9)]
    weight = torch.randn(5, 9, generator=generator)
    codes = torch.randint(-2, 3, (5, 9), generator=generator).float()
    codes[:, 0], codes[:, 4] = weight[:, 0].sign(), weight[:, 4].sign()
    scale = refit_scales(weight, codes, hessian, groups, torch.full((5, 2), 0.5), sweeps=400)
    for row in range(5):
        design = torch.stack([x[:, a:b] @ codes[row, a:b] for a, b in groups], 1)
        expected = torch.linalg.lstsq(design, (x @ weight[row]).unsqueeze(1)).solution[:, 0]
        if (expected > 0).all():
            torch.testing.assert_close(scale[row], expected, rtol=1e-2, atol=1e-2)
    empty = refit_scales(weight, torch.zeros(5, 9), hessian, groups, torch.full((5, 2), 0.5))
    assert torch.equal(empty, torch.full((5, 2), 0.5)), "without a spike nothing can be fitted"


def test_more_steps_err_less() -> None:
    errors = step_errors(
        torch.randn(30, 50, generator=torch.Generator().manual_seed(0)), torch.ones(50), 5
    )
    assert (errors.sum(1).diff() < 0).all()


@given(st.integers(1, 5), st.integers(1, 4), st.floats(1.0, 4.0), st.integers(0, 999))
def test_budget_is_spent_to_the_last_step_and_as_well_as_can_be(
    columns: int, most: int, budget: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gains = (
        torch.rand(most, columns, generator=generator).sort(0, descending=True).values
    )  # convex errors
    errors = 10 - gains.cumsum(0)
    steps = spend(errors, budget)
    total = min(round(budget * columns), most * columns)
    assert int(steps.sum()) == max(total, columns)
    every = torch.cartesian_prod(*[torch.arange(1, most + 1)] * columns).view(-1, columns)
    every = every[every.sum(1) == int(steps.sum())]
    best = min(float(errors[choice - 1, torch.arange(columns)].sum()) for choice in every)
    assert float(errors[steps - 1, torch.arange(columns)].sum()) == pytest.approx(best, abs=1e-5)


def test_a_step_that_pays_only_with_the_next_one_is_not_missed() -> None:
    errors = torch.tensor([[10.0, 10.0], [10.0, 9.0], [0.0, 8.0]])
    assert spend(errors, 2.0).tolist() == [3, 1]


@given(st.integers(1, 5), st.integers(1, 4), st.floats(1.0, 4.0), st.integers(0, 999))
def test_columns_of_several_layers_cost_what_they_hold(
    columns: int, most: int, budget: float, seed: int
) -> None:
    """No more is spent than there is; what is left buys nothing.

    No affordable choice is better by more than the steps that did not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 6, (columns,), generator=generator)
    gains = torch.rand(most, columns, generator=generator).sort(0, descending=True).values
    errors = 10 - gains.cumsum(0)
    steps = spend(errors, budget, costs.tolist())
    limit = min(round(budget * int(costs.sum())), most * int(costs.sum()))
    left = limit - int((steps * costs).sum())
    assert left >= 0
    assert all(left < int(costs[c]) or steps[c] == most for c in range(columns))
    every = torch.cartesian_prod(*[torch.arange(1, most + 1)] * columns).view(-1, columns)
    every = every[(every * costs).sum(1) <= limit]
    best = min(float(errors[choice - 1, torch.arange(columns)].sum()) for choice in every)
    assert (
        float(errors[steps - 1, torch.arange(columns)].sum())
        <= best + float(gains[1:].max() if most > 1 else 0) + 1e-5
    )


def test_rows_that_count_more_weigh_more() -> None:
    weight, importance = (
        torch.randn(6, 10, generator=torch.Generator().manual_seed(0)),
        torch.rand(10) + 0.1,
    )
    rows = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(
        step_errors(weight, importance, 3, rows), 3 * step_errors(weight[2:3], importance, 3)
    )
