from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.affine import code_in_range, column_groups, dequantize, round_to_nearest
from spikellm.transforms.clipping import clipped_range, fake_code, initial_logits


@given(st.integers(2, 8), st.booleans(), st.sampled_from([None, 3]), st.floats(-3, 6), st.integers(0, 10**6))
def test_what_is_trained_is_what_is_coded(bits: int, symmetric: bool, size: int | None, logit: float, seed: int) -> None:
    weight = torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))
    groups = column_groups(11, size)
    gamma, beta = (torch.full((5, len(groups)), value) for value in (logit, logit / 2))
    low, high = clipped_range(weight, groups, gamma, beta)
    trained = fake_code(weight, bits, groups, low, high, symmetric=symmetric)
    coded = dequantize(code_in_range(weight, bits, groups, low, high, symmetric=symmetric), groups)
    torch.testing.assert_close(trained, coded, rtol=1e-5, atol=1e-6)


def test_open_logits_are_round_to_nearest() -> None:
    weight, groups = torch.randn(4, 9), [(0, 9)]
    infinite = torch.full((4, 1), torch.inf)
    coded = code_in_range(weight, 4, groups, *clipped_range(weight, groups, infinite, infinite))
    for one, other in zip(coded, round_to_nearest(weight, 4, groups), strict=True):
        assert torch.equal(one, other)


def test_clipping_can_be_learned() -> None:
    """One huge weight in a row: narrowing the range pays, and the gradient finds it."""
    weight, groups = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)), [(0, 200)]
    weight[0, 0] = 12
    inputs = torch.randn(500, 200, generator=torch.Generator().manual_seed(1))
    inputs[:, 0] = 0
    gamma, beta = initial_logits(1, 1)
    for logit in (gamma, beta):
        logit.requires_grad_(True)
    optimizer = torch.optim.Adam([gamma, beta], lr=0.1)
    losses: list[Any] = []
    for _ in range(150):
        coded = fake_code(weight, 3, groups, *clipped_range(weight, groups, gamma, beta))
        loss = (inputs @ (coded - weight).T).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses) < 0.5 * losses[0]
    assert float(gamma.detach()) < 2
