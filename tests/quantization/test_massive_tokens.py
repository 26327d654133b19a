from __future__ import annotations

import math

import pytest
import torch

from spikellm.quantization.massive_tokens import (
    MassiveTokens,
    find_massive,
    is_beyond,
    range_width,
)


def widths(*large: float, ordinary: int = 1000) -> torch.Tensor:
    """Ordinary tokens between 1 and 1.5, then large ones."""
    return torch.cat([torch.linspace(1.0, 1.5, ordinary), torch.tensor(large)])


def test_tokens_far_above_the_median_are_found() -> None:
    found = find_massive(widths(2.4, 3.0, 200.0), 8, factor=2.0, rate=0.01)
    assert found is not None
    assert found.beyond == pytest.approx(2.5, abs=0.01)
    assert (found.steps, found.share) == (8, pytest.approx(2 / 1003))


def test_no_more_than_the_rate_are_massive() -> None:
    seen = widths(*torch.linspace(5, 50, 40).tolist())
    found = find_massive(seen, 8, factor=2.0, rate=0.01)
    assert found is not None
    assert found.share <= 0.01
    assert int(is_beyond(seen, found.beyond).sum()) == round(found.share * len(seen)) == 10
    ties = find_massive(widths(*[7.0] * 20, 9.0), 8, factor=2.0, rate=0.01)
    assert ties is not None
    assert ties.share == pytest.approx(1 / 1021), "equal ranges are all massive, or none is"


def test_even_tokens_have_no_massive_one() -> None:
    assert find_massive(widths(), 8, 2.0, 0.01) is None
    assert find_massive(torch.zeros(0), 8, 2.0, 0.01) is None
    assert find_massive(torch.zeros(9), 8, 2.0, 0.01) is None
    assert find_massive(widths(*[7.0] * 20), 8, 2.0, 0.01) is None, "too many that are equal"


def test_tokens_that_are_not_finite_are_ordinary() -> None:
    x = torch.tensor([[9.0, 0.0], [math.nan, 9.0], [math.inf, 0.0], [3e38, -3e38], [1.0, 2.0]])
    assert range_width(x)[:, 0].tolist()[0] == 9
    steps = MassiveTokens(8, 4.0, 0.1).steps_of(x, 2)
    assert steps.flatten().tolist() == [8, 2, 2, 2, 2]
