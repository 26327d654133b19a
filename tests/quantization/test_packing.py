from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.packing import pack, packed_length, unpack


@given(st.integers(1, 16), st.integers(0, 5), st.integers(0, 40), st.integers(0, 2**31))
def test_round_trip_and_size(bits: int, rows: int, length: int, seed: int) -> None:
    codes = torch.randint(
        0, 2**bits, (rows, length), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_length(length, bits))
    assert packed.shape[1] * 8 - length * bits in range(8)
    assert torch.equal(unpack(packed, bits, length).to(torch.int32), codes)


@given(st.integers(1, 16), st.integers(1, 30))
def test_layout_is_a_little_endian_bit_stream(bits: int, length: int) -> None:
    """Against Python's big integers: whoever writes a kernel can rely on it."""
    codes = torch.arange(length, dtype=torch.int64).mul(3737).remainder(2**bits)
    number = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(
        packed_length(length, bits), "little"
    )


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="codes from 4 to 4 do not fit into 2 bits"):
        pack(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="do not fit"):
        pack(torch.tensor([-1]), 2)
    with pytest.raises(ValueError, match="must be integers"):
        pack(torch.tensor([1.0]), 2)
