from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.digits import are_digits, digits_length, pack_digits, unpack_digits

BASES = st.one_of(st.sampled_from([3, 5, 7]), st.integers(2, 511))


@given(BASES, st.integers(0, 4), st.integers(0, 80), st.integers(0, 2**31))
def test_round_trip_and_size(base: int, rows: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, base, (rows, length), generator=generator)
    packed = pack_digits(digits, base)
    assert packed.shape == (rows, digits_length(length, base))
    assert torch.equal(unpack_digits(packed, base, length).long(), digits)
    assert are_digits(packed, base, length)
    assert packed.shape[1] * 8 >= length * math.log2(base)


@pytest.mark.parametrize(("base", "bits"), [(3, 1.6), (5, 7 / 3), (7, 48 / 17)])
def test_bits_of_a_digit(base: int, bits: float) -> None:
    assert digits_length(2040, base) * 8 == pytest.approx(2040 * bits)


@given(BASES, st.integers(1, 60), st.integers(0, 255))
def test_the_largest_digits_are_the_largest_bytes(base: int, length: int, byte: int) -> None:
    """What is larger than the packed row of largest digits is refused."""
    largest = pack_digits(torch.full((1, length), base - 1), base)
    assert are_digits(largest, base, length)
    larger = largest.clone()
    larger[0, -1] = max(byte, int(largest[0, -1]))
    changed = int(larger[0, -1]) > int(largest[0, -1])
    assert are_digits(larger, base, length) != changed


def test_bytes_of_ternary_digits_end_at_242() -> None:
    for value in (242, 243, 255):
        packed = torch.full((2, 3), value, dtype=torch.uint8)
        assert are_digits(packed, 3, 15) == (value < 243)
    assert not are_digits(torch.tensor([[9]], dtype=torch.uint8), 3, 2)


def test_digits_out_of_range_are_refused() -> None:
    for digit in (-1, 3):
        with pytest.raises(ValueError, match="are not of base 3"):
            pack_digits(torch.tensor([[0, digit]]), 3)
