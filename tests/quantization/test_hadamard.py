from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.hadamard import (
    factors,
    largest_power,
    mix,
    random_signs,
    shapiro,
    spread,
    turn,
)


def dense(size: int) -> torch.Tensor:
    """The matrix by its definition."""
    power, rest = factors(size)
    sylvester = torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(power)] for i in range(power)],
        dtype=torch.float64,
    )
    angle = 2 * torch.pi * torch.outer(torch.arange(rest), torch.arange(rest)).double() / rest
    return torch.kron(sylvester, angle.cos() + angle.sin()) / size**0.5


@given(size=st.integers(1, 200))
def test_the_matrix_is_what_it_is_said_to_be(size: int) -> None:
    matrix = spread(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix, dense(size), atol=1e-12)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix[0], matrix[0, :1].expand(size)), "its first row is constant"
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-9, "no entry is large"


@given(size=st.integers(1, 300))
def test_a_mix_is_a_rotation_by_two_of_hadamards_matrices(size: int) -> None:
    matrix, power = mix(torch.eye(size, dtype=torch.float64)), largest_power(size)
    assert power <= size < 2 * power
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    first, last = torch.eye(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    first[:power, :power] = dense(power)
    last[size - power :, size - power :] = shapiro(power).double().unsqueeze(1) * dense(power)
    assert torch.allclose(matrix, first if power == size else first @ last, atol=1e-12)


@given(size=st.integers(1, 200), seed=st.integers(0, 10**6))
def test_a_turn_is_a_rotation_that_layer_norm_commutes_with(size: int, seed: int) -> None:
    signs, x = (
        random_signs(size, seed),
        torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
    )
    turned = turn(x, signs)
    assert torch.allclose(turn(turned, signs), x, atol=1e-10)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1))
    assert torch.allclose(turned.mean(1), x.mean(1), atol=1e-12)
    norm = torch.nn.functional.layer_norm
    assert torch.allclose(norm(turned, (size,)), turn(norm(x, (size,)), signs), atol=1e-8)


@pytest.mark.parametrize("size", [172, 688, 1536, 11008, 13824, 14336])
def test_no_channel_stays_large_in_a_mix(size: int) -> None:
    rows = torch.zeros(40, size)
    places = torch.linspace(0, size - 1, 40).long()
    rows[torch.arange(40), places] = 1.0
    assert float(mix(rows).abs().max()) < 4.5 / size**0.5, "as a random rotation would spread it"


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(1, 4096, dtype=torch.float64)
    x[0, 77] = 64.0
    assert float(spread(x).abs().max()) == 1.0
    assert float(turn(x, random_signs(4096, 3)).abs().max()) < 5.0
