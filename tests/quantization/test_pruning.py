from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikellm.quantization.column_update import Windows, inverse_factor, propagate_error
from spikellm.quantization.pruning import (
    counts_by_block,
    lowest,
    lowest_in_groups,
    lowest_of_each,
)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [0, 1, 7, 20, 60])
def test_as_many_are_pruned_as_asked_for_ties_or_not(count: int) -> None:
    for scores in (random(5, 12), torch.zeros(5, 12), random(5, 12).round().abs()):
        marks = lowest(scores, count)
        assert int(marks.sum()) == count
        if 0 < count < 60:
            assert scores[marks].max() <= scores[~marks].min()
            equal = (scores == scores[marks].max()).flatten()
            kept = equal & ~marks.flatten()
            assert not kept.any() or int(equal.nonzero()[0]) < int(kept.nonzero()[0])


def test_blocks_get_what_the_whole_layer_s_ranking_gives_them() -> None:
    scores = random(4, 10).abs()
    counts = counts_by_block(scores, 13, 4)
    marks = lowest(scores, 13)
    assert counts == [int(part.sum()) for part in marks.split(4, 1)]
    assert sum(counts) == 13


def test_rows_and_groups_lose_exactly_n() -> None:
    scores = random(6, 11).abs()
    assert lowest_of_each(scores, 4).sum(1).tolist() == [4] * 6
    marks = lowest_in_groups(scores, 2, 4)
    assert all((part.sum(1) == 2).all() for part in marks[:, :8].split(4, 1))
    assert marks[:, 8:].sum(1).tolist() == [1] * 6, "three columns left: one of them"


@pytest.mark.parametrize("width", [4, 7, 128])
def test_windows_are_seen_as_error_feedback_leaves_them(width: int) -> None:
    """What is looked at is what the columns would be coded from if the window went uncoded."""
    weight, x = random(3, 150), random(400, 150) @ random(150, 150)
    factor = inverse_factor((x.T @ x).double(), 0.01, "layer").upper
    seen: dict[int, Tensor] = {}
    coded: dict[int, Tensor] = {}

    def code(column: int, w: Tensor, error: Tensor) -> None:
        coded[column] = w.clone()
        torch.sub(w, w.round(), out=error)

    propagate_error(weight, factor, code, Windows(width, lambda at, w: seen.update({at: w})))
    assert sum(len(w) for w in seen.values()) == 150
    for first, w in seen.items():
        torch.testing.assert_close(w[0], coded[first], rtol=1e-4, atol=1e-4)
        assert first == 0 or not torch.allclose(w[-1], weight[:, first + len(w) - 1])
    plain: dict[int, Tensor] = {}

    def again(column: int, w: Tensor, error: Tensor) -> None:
        plain[column] = w.clone()
        torch.sub(w, w.round(), out=error)

    propagate_error(weight, factor, again)
    if width == 128:
        assert all(torch.equal(plain[column], coded[column]) for column in coded)
