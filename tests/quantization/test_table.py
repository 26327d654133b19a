from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.affine import column_groups, dequantize, round_to_nearest
from spikellm.quantization.table import code_table


@given(
    st.integers(1, 20),
    st.integers(1, 50),
    st.integers(2, 8),
    st.sampled_from([None, 7]),
    st.integers(0, 2**31),
)
def test_no_group_loses_more_than_in_its_whole_range(
    rows: int, columns: int, bits: int, size: int | None, seed: int
) -> None:
    table = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    table[0] = 0
    groups = column_groups(columns, size)
    found = code_table(table, bits, groups)
    plain = round_to_nearest(table, bits, groups, symmetric=True)
    assert bool((found.zero == 2 ** (bits - 1)).all())
    assert bool((dequantize(found, groups)[0] == 0).all())
    lost, most = ((dequantize(one, groups).double() - table).square() for one in (found, plain))
    for start, stop in groups:
        own, whole = lost[:, start:stop].sum(1), most[:, start:stop].sum(1)
        assert bool((own <= whole * (1 + 1e-6)).all())
