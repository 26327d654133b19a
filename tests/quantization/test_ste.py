from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spikellm.quantization.affine import column_groups, dequantize, round_to_nearest
from spikellm.quantization.ste import WeightCoding, fake_quantize_weight, pass_through, scale_weight


def chain(
    weight: Tensor, coding: WeightCoding, gamma: Tensor, beta: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """The same as ``fake_quantize_weight``, one differentiable operation after the other."""

    def through(value: Tensor) -> Tensor:
        return value + (torch.floor(value + 0.5) - value).detach()

    scaled = coding.stored(scale_weight(weight, rows, columns))
    parts = []
    for index, (start, stop) in enumerate(coding.groups):
        top = coding.tops[index]
        middle = (top + 1) // 2
        w = scaled[:, start:stop]
        low = torch.sigmoid(beta[:, index : index + 1]) * w.amin(1, keepdim=True).clamp(max=0)
        high = torch.sigmoid(gamma[:, index : index + 1]) * w.amax(1, keepdim=True).clamp(min=0)
        scale = torch.maximum(high, -low) / (top // 2) if coding.symmetric else (high - low) / top
        zero = (
            torch.full_like(scale, middle)
            if coding.symmetric
            else torch.floor((-low / scale).detach() + 0.5).clamp(0, top)
        )
        parts.append(
            ((through(w / scale) + zero).clamp(top % 2 if coding.symmetric else 0, top) - zero)
            * scale
        )
    return coding.unstored(torch.cat(parts, 1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_those_of_the_chain(bits: int, grouped: bool, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 17, generator=generator)
    groups = [(0, 5), (5, 10), (10, 14), (14, 17)] if grouped else [(0, 17)]
    coding = WeightCoding(
        [2**bits - 1, 6, 5, 2**bits][: len(groups)],
        symmetric,
        groups,
        torch.randperm(17, generator=generator) if grouped else None,
    )
    weight[:3] = (weight[:3] * 2).round() / 2  # ties at the ends
    gamma, beta = (torch.rand(6, len(groups), generator=generator) * 3 - 1 for _ in range(2))
    rows, columns = (torch.rand(n, generator=generator) + 0.5 for n in (6, 17))
    columns[:9] = 1.0
    towards = torch.randn(6, 17, generator=generator)
    gradients = []
    for function in (
        lambda g, b, r, c: fake_quantize_weight(weight, coding, (g, b), r, c),
        lambda g, b, r, c: chain(weight, coding, g, b, r, c),
    ):
        leaves = [tensor.clone().requires_grad_(True) for tensor in (gamma, beta, rows, columns)]
        result = function(*leaves)
        (result * towards).sum().backward()
        gradients.append((result.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, 3]),
    st.floats(-3, 6),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_what_is_trained_is_what_is_coded(
    bits: int, symmetric: bool, size: int | None, logit: float, moved: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 11, generator=generator)
    groups = column_groups(11, size)
    coding = WeightCoding(
        [2**bits - 1] * len(groups),
        symmetric,
        groups,
        torch.randperm(11, generator=generator) if moved else None,
    )
    rows = torch.rand(5, generator=generator) + 0.5
    clip = (
        torch.full((5, len(coding.groups)), logit),
        torch.full((5, len(coding.groups)), logit / 2),
    )
    trained = fake_quantize_weight(weight, coding, clip, rows, None)
    coded = dequantize(coding.code(scale_weight(weight, rows, None), clip), coding.groups)
    assert torch.equal(trained, coding.unstored(coded))


def test_without_clipping_it_is_round_to_nearest() -> None:
    weight, groups = torch.randn(4, 9), [(0, 9)]
    for one, other in zip(
        WeightCoding([15], False, groups, None).code(weight, None),
        round_to_nearest(weight, 4, groups),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_gradient_passes_to_the_input_alone() -> None:
    x, coded = torch.randn(3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    result = pass_through(x, coded)
    assert torch.equal(result, coded)
    (result * torch.tensor([2.0, 3.0, 4.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 3, 4]
