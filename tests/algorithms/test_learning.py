"""The loop that learning algorithms share."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spikellm.algorithms.learning import Learning, Manner, check_share
from spikellm.core.errors import RequestError

COURSE = SimpleNamespace(epochs=3, batch_size=1, accumulate=1)


class Point(NamedTuple):
    """One number, learned."""

    place: Tensor

    def clone(self) -> Point:
        return Point(self.place.detach().clone())

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.place], 0.1)]


def learning(manner: Manner, targets: list[float]) -> tuple[Learning[Point], list[float]]:
    """Towards the targets, and those that gradients were asked of, as they come."""
    learned_from: list[float] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return ((torch.zeros(1), torch.tensor([target])) for target in targets)

    def error(point: Point, _: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            learned_from.append(float(target))
        return (point.place - target).square().mean()

    return Learning("block", COURSE, batches, error, manner), learned_from


def test_what_is_held_out_is_not_learned_from_and_decides() -> None:
    """Every fourth batch wants the opposite of what the others want."""
    opposite = [1.0, 1.0, 1.0, -1.0] * 2
    start = Point(torch.zeros(1))
    judged, seen = learning(Manner("toy", "the rate", held_out=4), opposite)
    assert judged.from_start(start) is start
    assert set(seen) == {1.0}
    trusting, seen = learning(Manner("toy", "the rate"), opposite)
    assert float(trusting.from_start(start).place) > 0
    assert set(seen) == {1.0, -1.0}
    few, seen = learning(Manner("toy", "the rate", held_out=9), opposite)
    assert float(few.from_start(start).place) > 0, "too few to hold one out"


def test_rates_fall_along_a_cosine() -> None:
    run, _ = learning(Manner("toy", "the rate", last_rate=0.5), [5.0] * 8)
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted)
        run.from_start(Point(torch.zeros(1)))
    assert len(rates) == 24
    assert rates[0] == pytest.approx(0.1)
    assert rates[12] == pytest.approx(0.075)
    assert rates == sorted(rates, reverse=True)
    assert 0.05 < rates[-1] < 0.051


def test_ranks_hold_the_same_batches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikellm.core.distributed.gather_counts", lambda count: [count] * 2)
    check_share(COURSE, [8, 8], held_out=8)
    with pytest.raises(RequestError, match="have 12, 12 batches of 1 windows; each holds one in 8"):
        check_share(COURSE, [8, 4], held_out=8)
