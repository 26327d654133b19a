from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from spikellm.kernels.native import backend
from spikellm.kernels.sums import sum_by_channel

pytestmark = pytest.mark.skipif(
    backend.problem() is not None, reason="no native kernels on this machine"
)


@given(
    st.integers(0, 2**31),
    st.integers(1, 700),
    st.integers(1, 19),
    st.sampled_from([torch.uint8, torch.int32]),
    st.sampled_from(["none", "token", "value"]),
)
@examples(40)
def test_sums_are_those_of_looked_up_sizes(
    seed: int, rows: int, channels: int, dtype: torch.dtype, baseline: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 1021, (256, 4), generator=generator)
    codes = torch.randint(0, 256, (rows, channels), generator=generator).to(dtype)
    width = 1 if baseline == "token" else channels
    z = torch.randint(0, 256, (rows, width), generator=generator).to(dtype)
    found = sum_by_channel(codes, None if baseline == "none" else z, table)
    assert found is not None
    own = codes.long() - (0 if baseline == "none" else z.long())
    assert torch.equal(found[0], table[own.abs()].sum(0))
    assert torch.equal(found[1], table[codes.long()].sum(0))


def test_heads_and_negative_codes() -> None:
    codes = torch.randint(-15, 16, (2, 3, 5, 8), dtype=torch.int32)
    z = torch.arange(3, dtype=torch.int32).view(1, 3, 1, 1)
    table = torch.arange(18).unsqueeze(1)
    found = sum_by_channel(codes, z, table)
    assert found is not None
    assert torch.equal(found[0][:, 0], (codes - z).abs().sum((0, 1, 2)))
    assert torch.equal(found[1][:, 0], codes.abs().sum((0, 1, 2)))


def test_what_the_kernel_cannot_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.full((2, 3), 7, dtype=torch.int32)
    assert sum_by_channel(codes, None, torch.ones(7, 1)) is None, "7 is not in the table"
    assert sum_by_channel(codes, None, torch.full((8, 1), 2**15)) is None, "fields overflow"
    assert sum_by_channel(codes, None, torch.ones(8, 5)) is None, "more fields than a word has"
    assert sum_by_channel(codes.to(torch.uint8), None, torch.ones(8, 1)) is None
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    assert sum_by_channel(codes, None, torch.ones(8, 1)) is None
