"""Expected spikes and their gradients, against sums and finite differences."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.neurons import SpikeForm
from spikellm.neurons.penalty import expected_spikes, spike_penalty
from spikellm.neurons.price import best_levels, spikes_of_counts

FORMS = get_args(SpikeForm)


def points(seed: int, scale: float = 6.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, generator=generator, dtype=torch.float64) * scale


@given(
    st.sampled_from(FORMS),
    st.sampled_from(["binary", "signed-digit"]),
    st.floats(0, 9),
    st.integers(0, 10**6),
)
def test_they_are_the_mean_over_noise(form: str, recoding: str, price: float, seed: int) -> None:
    units, many = points(seed), 4001
    noise = (torch.arange(many, dtype=torch.float64) + 0.5) / many - 0.5
    edges, counts = best_levels(price, spikes_of_counts(form, recoding, 15))  # type: ignore[arg-type]
    drawn = (units.unsqueeze(1) + noise).abs()
    spikes = spikes_of_counts(form, recoding, 15)[counts]  # type: ignore[arg-type]
    mean = spikes[torch.bucketize(drawn, edges, right=True)].double().mean(1)
    found = expected_spikes(units, price, 15, form, recoding)  # type: ignore[arg-type]
    torch.testing.assert_close(found, mean, rtol=0, atol=15 / many * 2)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form: SpikeForm) -> None:
    price = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    x = points(3, 2.0).requires_grad_()
    theta = torch.tensor(0.43, dtype=torch.float64, requires_grad=True)

    def penalty(x: torch.Tensor, theta: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
        return expected_spikes(x / theta, price, 15, form).sum()

    penalty(x, theta, price).backward()
    step = 1e-6
    for value in (x, theta, price):
        assert value.grad is not None
        direction = torch.ones_like(value) if value.dim() == 0 else points(5)
        ends = []
        for sign in (1, -1):
            moved = value.detach() + sign * step * direction
            ends.append(penalty(*(moved if one is value else one for one in (x, theta, price))))
        slope = float((ends[0] - ends[1]).detach()) / (2 * step)
        assert slope == pytest.approx(float((value.grad * direction).sum()), rel=1e-5, abs=1e-6)
        assert slope != 0


def test_the_true_number_has_that_gradient() -> None:
    units = points(1).requires_grad_()
    true = spike_penalty(units, 0.5, 15, "phase")
    edges, counts = best_levels(0.5, spikes_of_counts("phase", "binary", 15))
    at = torch.bucketize(units.detach().abs(), edges, right=True)
    assert torch.equal(true.round(), spikes_of_counts("phase", "binary", 15)[counts][at].double())
    (through,) = torch.autograd.grad(true.sum(), units)
    (own,) = torch.autograd.grad(expected_spikes(units, 0.5, 15, "phase").sum(), units)
    assert torch.equal(through, own)
    assert bool((own != 0).any())


def test_a_higher_price_lowers_it() -> None:
    price = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    expected_spikes(points(2), price, 15, "binary").sum().backward()
    assert price.grad is not None
    assert float(price.grad) < 0
