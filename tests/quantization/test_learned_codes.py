from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikellm.quantization.affine import column_groups, dequantize, round_to_nearest
from spikellm.quantization.learned_codes import CodeGrid, bounded, learned_weight, whole
from spikellm.quantization.ste import pass_through


def problem(*, zero: bool, by_value: bool) -> tuple[CodeGrid, tuple[Tensor, ...]]:
    """A matrix of 10 columns in groups of 4, 4 and 2, some weights clipped."""
    bounds = [(0, 3)] * 3 if zero else [(-2, 2), (-1, 1), (-3, 3)]
    grid = CodeGrid.of(column_groups(10, 4), bounds, by_value=by_value)
    weight, scale = torch.randn(5, 10) * 4, torch.rand(5, 3) + 0.5
    zeros = torch.tensor([[1.0, 2.0, 0.0]]).repeat(5, 1) if zero else torch.zeros(5, 3)
    return grid, (weight, scale, zeros)


@pytest.mark.parametrize("by_value", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_gradients_pass_straight_through_the_rounding(*, zero: bool, by_value: bool) -> None:
    """As torch computes them where only the rounding is replaced."""
    torch.manual_seed(0)
    grid, (weight, scale, zeros) = problem(zero=zero, by_value=by_value)
    ours, theirs = (
        [one.clone().requires_grad_(True) for one in (weight, scale, zeros)] for _ in range(2)
    )
    value = learned_weight(*ours, grid)
    w, s, z = theirs[0], *(grid.spread(one) for one in theirs[1:])
    position = w / s if by_value else w
    code = pass_through(position, position.detach().round()) + z
    straight = (torch.clamp(code, grid.least, grid.most) - z) * s
    torch.testing.assert_close(value, straight)
    assert bool((code > grid.most).any()), "some are clipped"
    torch.manual_seed(1)
    given = torch.randn_like(value)
    value.backward(given)
    straight.backward(given)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_values_are_those_of_the_codes() -> None:
    torch.manual_seed(0)
    weight, groups = torch.randn(6, 10), column_groups(10, 4)
    coded = round_to_nearest(weight, 2, groups)
    grid = CodeGrid.of(groups, [(0, 3)] * 3, by_value=True)
    scale, zero = coded.scale, coded.zero.float()
    assert torch.equal(grid.codes(weight, scale, zero).to(torch.uint8), coded.codes)
    value = learned_weight(weight, scale, zero, grid)
    assert torch.equal(value, dequantize(coded, groups))


def test_what_is_beyond_its_bounds_is_not_stuck_there() -> None:
    values = torch.tensor([-1.0, 0.5, 9.0], requires_grad=True)
    kept = bounded(values, torch.tensor(0.1), torch.tensor(2.0))
    assert kept.tolist() == pytest.approx([0.1, 0.5, 2.0])
    kept.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 1, 1]
    assert whole(torch.tensor([-0.7, 1.5, 9.0]), torch.tensor(3.0)).tolist() == [0, 2, 3]
