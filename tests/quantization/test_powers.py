from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.powers import (
    ShiftedScales,
    digits_of,
    nearest_sum_of_powers,
    shifted,
    terms_of,
)


@given(st.integers(1, 1 << 20))
def test_digits_are_the_number_and_no_two_neighbours_are_set(number: int) -> None:
    digits = digits_of(number)
    assert sum(digit << place for place, digit in enumerate(digits)) == number
    assert all(not (a and b) for a, b in pairwise(digits))


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_nearest_sum_of_powers(terms: int) -> None:
    value = torch.rand(200, generator=torch.Generator().manual_seed(terms)) * 10 + 1e-3
    found = nearest_sum_of_powers(value, terms)
    assert torch.equal(found.to(torch.bfloat16).float(), found), "bfloat16 holds it"
    assert int(terms_of(found).max()) <= terms
    allowed = [
        n for n in range(128, 257) if sum(map(abs, digits_of(n))) <= terms
    ]  # by brute force, over some powers of two
    every = torch.tensor([n * 2.0**e for n in allowed for e in range(-20, 0)])
    best = (every - value[:, None]).abs().amin(1)
    assert torch.allclose((found - value).abs(), best, atol=1e-7)


@given(st.integers(0, 999), st.integers(1, 3))
def test_shifts_and_additions_give_the_bits_of_the_product(seed: int, terms: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 5, generator=generator) * 10.0 ** float(torch.randint(-5, 5, ()))
    x[0, 0] = 0
    scale = nearest_sum_of_powers(torch.rand(5, generator=generator) + 0.01, terms)
    assert torch.equal(ShiftedScales(scale)(x), x * scale)
    assert torch.equal(ShiftedScales(scale.to(torch.bfloat16))(x), x * scale)


def test_what_is_not_finite_stays() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    found = ShiftedScales(torch.full((4,), 1.75))(x)
    assert torch.equal(found.nan_to_num(7.0), x.nan_to_num(7.0))


def test_a_shift_adds_to_the_exponent() -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -3.25], dtype=torch.float64)
    assert torch.equal(shifted(x, torch.tensor(-3)), x / 8)


def test_numbers_of_many_digits_are_seen() -> None:
    assert terms_of(torch.tensor([1.0, 1.75, 1.625, 1.001])).tolist() == [1, 2, 3, 8]
