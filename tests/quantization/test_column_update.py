from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.core.errors import NumericalError
from spikellm.quantization.column_update import inverse_factor, propagate_error


def inputs(columns: int, seed: int = 0, tokens: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )


def coarse(_: int, w: torch.Tensor) -> torch.Tensor:
    return (w * 2).round() / 2


def by_elimination(
    weight: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ as OBS states it: after each column the inverse Hessian of the remaining ones is
    computed anew.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    coded, loss = torch.empty_like(weight), torch.zeros(len(weight), dtype=torch.float64)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        coded[:, column] = coarse(column, weight[:, column])
        error = (weight[:, column] - coded[:, column]) / inverse[0, 0]
        loss += error * (weight[:, column] - coded[:, column])
        weight[:, column:] -= error.unsqueeze(1) * inverse[0].unsqueeze(0)
    return coded, loss


@given(st.integers(1, 150), st.integers(0, 99))
def test_it_is_optimal_brain_surgery_column_by_column(columns: int, seed: int) -> None:
    x = inputs(columns, seed)
    hessian = x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(columns)
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    coded = torch.empty_like(weight)

    def code(column: int, w: torch.Tensor, error: torch.Tensor) -> None:
        coded[:, column] = coarse(column, w)
        error.copy_(w - coded[:, column])

    loss = propagate_error(weight, inverse_factor(hessian, 1e-12, "layer").upper, code)
    expected, expected_loss = by_elimination(weight, hessian)
    same = (coded.double() - expected).abs().amax(
        1
    ) < 1e-3  # a weight at the border of two codes may fall on either side
    assert same.float().mean() >= 0.6
    torch.testing.assert_close(loss.double()[same], expected_loss[same], rtol=1e-2, atol=1e-3)


def test_the_loss_is_that_of_the_output_and_feedback_lowers_it() -> None:
    x, weight = inputs(200), torch.randn(16, 200, generator=torch.Generator().manual_seed(1))
    coded = torch.empty_like(weight)

    def code(column: int, w: torch.Tensor, error: torch.Tensor) -> None:
        coded[:, column] = coarse(column, w)
        error.copy_(w - coded[:, column])

    hessian = x.T @ x
    loss = propagate_error(weight, inverse_factor(hessian, 1e-9, "layer").upper, code)
    difference = weight - coded
    measured = (x @ difference.T).square().sum(0)
    torch.testing.assert_close(loss, measured, rtol=1e-2, atol=1e-2)
    assert float(measured.sum()) < 0.5 * float((x @ (weight - coarse(0, weight)).T).square().sum())


def test_dead_channels_are_independent() -> None:
    x = inputs(12)
    x[:, 5] = 0
    factor, damping = inverse_factor(x.T @ x, 0.01, "layer")
    assert damping == 0.01
    assert torch.isfinite(factor).all()
    assert factor[5, 6:].abs().max() == 0
    assert factor[:5, 5].abs().max() == 0
    assert torch.isfinite(inverse_factor(torch.zeros(4, 4), 0.01, "layer").upper).all(), (
        "no input ever"
    )


def test_a_hessian_that_is_not_positive_definite_raises_damping_and_says_so() -> None:
    x = inputs(6)
    hessian = x.T @ x
    hessian -= 1.05 * torch.linalg.eigvalsh(hessian)[0] * torch.eye(
        6
    ) + 0.02 * hessian.diagonal().mean() * torch.eye(6)
    factor, damping = inverse_factor(hessian, 0.01, "a.b")
    assert torch.isfinite(factor).all()
    assert damping >= 0.1
    with pytest.raises(
        NumericalError, match=r"layer a\.b: its Hessian is not positive definite, even with damping"
    ):
        inverse_factor(torch.diag(torch.tensor([1.0, -1e12])), 0.01, "a.b")
    with pytest.raises(NumericalError, match=r"layer a\.b: .*NaN or infinity"):
        inverse_factor(torch.full((2, 2), torch.nan), 0.01, "a.b")


def test_columns_to_come_stay_at_their_optimum() -> None:
    """Where nothing is left for a first-order term (FOEM) to repair: the gradient of the output's
    error with respect to columns that are still to be coded is zero after each.
    """
    columns = 24
    x = inputs(columns).double()
    hessian = x.T @ x
    original = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    weight, gaps = original.clone(), list[float]()
    coded = torch.empty_like(weight)

    def code(column: int, w: torch.Tensor, error: torch.Tensor) -> None:
        coded[:, column] = coarse(column, w)
        error.copy_(w - coded[:, column])

    for stop in range(1, columns):
        # the best continuation of what is coded so far, computed by itself
        propagate_error(weight.copy_(original), inverse_factor(hessian, 1e-12, "layer").upper, code)
        error = (coded[:, :stop] - original[:, :stop]).double()
        rest = -torch.linalg.solve(hessian[stop:, stop:], hessian[stop:, :stop] @ error.T).T
        drifted = original[:, stop:].double() + rest
        expected = coarse(stop, drifted[:, 0].float())
        gaps.append(float((expected - coded[:, stop]).abs().max()))
    assert sum(gap == 0 for gap in gaps) >= 0.9 * len(gaps), "borders of codes aside"
