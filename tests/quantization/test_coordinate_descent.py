from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spikellm.quantization import coordinate_descent
from spikellm.quantization.coordinate_descent import descend, pull_of

STEP = 0.5  # between codes


class Codes:
    """Multiples of STEP up to 2 in size, as a coder gives them."""

    def value(self, _: int, wanted: Tensor, value: Tensor) -> None:
        value.copy_((wanted / STEP).round().clamp(-4, 4) * STEP)


def problem(columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(5, columns, generator=generator)
    values = torch.empty_like(weight)
    Codes().value(0, weight, values)
    return weight, values, x.T @ x / 400


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    difference = (weight - values).double()
    return ((difference @ hessian.double()) * difference).sum(1)


def one_by_one(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Every code of a column tried, all else as it is."""
    values = values.clone()
    for column in range(weight.shape[1]):
        tried = torch.arange(-4, 5) * STEP
        losses = []
        for value in tried.tolist():
            values_with = values.clone()
            values_with[:, column] = value
            losses.append(loss(weight, values_with, hessian))
        values[:, column] = tried[torch.stack(losses).argmin(0)]
    return values


@given(st.sampled_from([1, 2, 7, 40]), st.integers(0, 99))
def test_a_sweep_takes_the_best_code_of_every_column_in_turn(columns: int, seed: int) -> None:
    weight, values, hessian = problem(columns, seed)
    found, changed = descend(weight, values, pull_of(hessian), Codes().value)
    expected = one_by_one(weight, values, hessian)
    torch.testing.assert_close(
        loss(weight, found, hessian), loss(weight, expected, hessian), rtol=1e-4, atol=1e-4
    )  # codes that are equally good may differ
    assert changed == int((found != values).sum())


def test_it_comes_to_rest_where_no_other_code_is_better() -> None:
    weight, values, hessian = problem(300, 3)  # several strips of columns
    losses = [loss(weight, values, hessian)]
    for _ in range(200):
        values, changed = descend(weight, values, pull_of(hessian), Codes().value)
        losses.append(loss(weight, values, hessian))
        assert (losses[-1] <= losses[-2] * (1 + 1e-5)).all()
        if not changed:
            break
    assert changed == 0
    assert float(losses[-1].sum()) < 0.5 * float(losses[0].sum())
    for column in range(0, 300, 37):
        for move in (-STEP, STEP):
            other = values.clone()
            other[:, column] = (other[:, column] + move).clamp(-2, 2)
            assert (loss(weight, other, hessian) >= losses[-1] * (1 - 1e-5)).all()


def test_channels_that_never_fire_and_damping() -> None:
    weight, values, hessian = problem(12, 0)
    hessian[5] = hessian[:, 5] = 0
    found, _ = descend(weight, values, pull_of(hessian), Codes().value)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 5], values[:, 5])
    damped, _ = descend(weight, values, pull_of(hessian, damping=1e6), Codes().value)
    nearest = torch.empty_like(weight)
    Codes().value(0, weight, nearest)
    assert torch.equal(damped, nearest), "damped without end, the Hessian is a multiple of one"
    found, changed = descend(weight, values, pull_of(torch.zeros(12, 12)), Codes().value)
    assert changed == 0
    assert torch.equal(found, values)


def test_strips_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values, hessian = problem(90, 1)
    whole, _ = descend(weight, values, pull_of(hessian), Codes().value)
    monkeypatch.setattr(coordinate_descent, "BLOCK", 7)
    strips, _ = descend(weight, values, pull_of(hessian), Codes().value)
    assert float((whole != strips).float().mean()) < 0.02
