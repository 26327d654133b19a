from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from budget import examples
from spikellm.kernels.native import backend
from spikellm.kernels.sums import Lookup, sum_by_channel

pytestmark = pytest.mark.skipif(
    backend.problem() is not None, reason="no native kernels on this machine"
)


@given(
    st.integers(0, 2**31),
    st.integers(1, 700),
    st.integers(1, 150),
    st.sampled_from([torch.uint8, torch.int32]),
    st.sampled_from(["none", "token", "value"]),
    st.sampled_from([2, 16, 31, 32, 33, 64, 65, 256]),
    st.sampled_from([2, 16, 256, 1021]),
)
@examples(60)
def test_sums_are_those_of_looked_up_sizes(  # noqa: PLR0913  drawn one by one
    seed: int,
    rows: int,
    channels: int,
    dtype: torch.dtype,
    baseline: str,
    sizes: int,
    most: int,
) -> None:
    """Small sizes and small numbers are looked up many at a time, where a processor can."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, most, (256, 4), generator=generator)
    table[0, 0] = most - 1
    codes = torch.randint(0, sizes, (rows, channels), generator=generator).to(dtype)
    width = 1 if baseline == "token" else channels
    z = torch.randint(0, sizes, (rows, width), generator=generator).to(dtype)
    found = sum_by_channel(codes, None if baseline == "none" else z, Lookup.of(table))
    assert found is not None
    own = codes.long() - (0 if baseline == "none" else z.long())
    assert torch.equal(found[0], table[own.abs()].sum(0))
    assert torch.equal(found[1], table[codes.long()].sum(0))


def test_heads_and_negative_codes() -> None:
    codes = torch.randint(-15, 16, (2, 3, 5, 8), dtype=torch.int32)
    z = torch.arange(3, dtype=torch.int32).view(1, 3, 1, 1)
    table = torch.arange(18).unsqueeze(1)
    found = sum_by_channel(codes, z, Lookup.of(table))
    assert found is not None
    assert torch.equal(found[0][:, 0], (codes - z).abs().sum((0, 1, 2)))
    assert torch.equal(found[1][:, 0], codes.abs().sum((0, 1, 2)))


def test_what_the_kernel_cannot_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(codes: Tensor, table: Tensor) -> object:
        return sum_by_channel(codes, None, Lookup.of(table))

    codes = torch.full((2, 3), 7, dtype=torch.int32)
    assert found(codes, torch.ones(7, 1)) is None, "7 is not in the table"
    assert found(codes, torch.full((8, 1), 2**15)) is None, "fields overflow"
    assert found(codes, torch.ones(8, 5)) is None, "more fields than a word has"
    assert found(codes.to(torch.uint8), torch.ones(8, 1)) is None
    assert found(codes, torch.ones(8, 1)) is not None
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    assert found(codes, torch.ones(8, 1)) is None
