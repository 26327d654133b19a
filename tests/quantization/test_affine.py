from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.quantization.affine import column_groups, dequantize, round_to_nearest


@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, 1, 3, 7, 100]),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(0, 1000),
)
def test_error_is_at_most_one_step(
    bits: int, symmetric: bool, group_size: int | None, rows: int, columns: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    groups = column_groups(columns, group_size)
    coded = round_to_nearest(weight, bits, groups, symmetric=symmetric)
    assert coded.scale.shape == coded.zero.shape == (rows, len(groups))
    assert int(coded.codes.max()) < 2**bits
    error = (dequantize(coded, groups) - weight).abs()
    for group, (start, stop) in enumerate(groups):
        assert (
            error[:, start:stop]
            <= coded.scale[:, group : group + 1] * (1.0001 if not symmetric else 0.5001)
        ).all()


def test_rows_of_zeros_stay_zero() -> None:
    for symmetric in (False, True):
        assert (
            dequantize(
                round_to_nearest(torch.zeros(2, 5), 4, [(0, 5)], symmetric=symmetric), [(0, 5)]
            )
            .abs()
            .max()
            == 0
        )


def test_zero_weight_is_always_a_level() -> None:
    weight = torch.tensor([[3.0, 5.0, 0.0], [-3.0, -5.0, 0.0]])
    assert dequantize(round_to_nearest(weight, 3, [(0, 3)]), [(0, 3)])[:, 2].tolist() == [0.0, 0.0]


def test_more_bits_lose_less() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        float(
            (dequantize(round_to_nearest(weight, bits, [(0, 64)]), [(0, 64)]) - weight)
            .square()
            .mean()
        )
        for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(sorted),
    st.sampled_from([None, 1, 2, 5]),
)
def test_groups_cover_all_columns_and_never_cross_a_section(
    ends: list[int], group_size: int | None
) -> None:
    groups = column_groups(ends, group_size)
    assert [column for start, stop in groups for column in range(start, stop)] == list(
        range(ends[-1])
    )
    assert all(start < stop and stop - start <= (group_size or 99) for start, stop in groups)
    assert not any(start < end < stop for start, stop in groups for end in ends)
