"""Partly binary weights on inputs that are not coded, beside the torch path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from native import best_level, both, forget, needs_compiler, partly_binary
from spikellm.core.errors import RequestError
from spikellm.kernels.native import build


def close(found: Tensor, expected: Tensor) -> None:
    """To rounding, of the largest output."""
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 2.0**-17)


@needs_compiler
@given(
    st.integers(1, 150),
    st.integers(1, 40),
    st.integers(0, 30),
    st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    st.sampled_from([None, 17, 64]),
    st.integers(0, 2**31),
)
def test_equals_torch(
    columns: int, outputs: int, tokens: int, rate: float, group: int | None, seed: int
) -> None:
    layer = partly_binary(columns, outputs, rate, group, seed)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    found, expected = both(layer, x)
    if tokens:
        close(found, expected)
    short, _ = both(layer, x.bfloat16())
    assert short.dtype == torch.bfloat16
    assert torch.equal(short, both(layer, x.bfloat16().float())[0].bfloat16())


@needs_compiler
def test_every_level_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = partly_binary(157, 33, 0.2, 50, seed=0)
    x, found = torch.randn(6, 157, generator=torch.Generator().manual_seed(1)), []
    for name in build.LEVELS[: best_level() + 1]:
        monkeypatch.setenv("SPIKELLM_KERNELS_LEVEL", name)
        forget()
        found.append(both(layer, x)[0])
    monkeypatch.undo()
    forget()
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_compiler
@pytest.mark.parametrize("tokens", [7, 40])
def test_threads_change_nothing(tokens: int) -> None:
    layer, x = partly_binary(130, 70, 0.2, None, seed=0), torch.randn(tokens, 130)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(layer(x))
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        close(other, outputs[0])


@needs_compiler
def test_its_operator_is_sound() -> None:
    layer = partly_binary(20, 6, 0.3, None, seed=0)
    x = torch.randn(2, 20)
    layer(x)
    assert layer._kernels is not None
    operator = torch.ops.spikellm.partly_binary_linear.default
    torch.library.opcheck(operator, (x, *layer._kernels.chosen.operands))


@needs_compiler
def test_bits_behind_the_last_column_are_nobodys() -> None:
    layer, x = partly_binary(33, 20, 0.4, None, seed=0), torch.randn(5, 33)
    before = both(layer, x)[0]
    layer.get_buffer("salient_mask")[:, -1] |= 0xFE
    assert torch.equal(both(layer, x)[0], before)


@needs_compiler
def test_codes_that_do_not_fit_the_mask_are_refused() -> None:
    layer = partly_binary(40, 5, 0.3, None, seed=0)
    layer.get_buffer("salient_mask").fill_(0)
    with pytest.raises(RequestError, match="codes for 0 salient weights"):
        both(layer, torch.randn(2, 40))
