"""Rounding that weighs loss against spikes."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.neurons import SoftResetNeuron, SpikeForm, make_neuron, with_price, with_train
from spikellm.neurons.price import best_levels, phase_levels, spikes_of_counts, whole_price
from spikellm.quantization.thresholds import threshold_for_range, token_range
from spikellm.recipe import ActivationRecipe, AttentionRecipe, recipe_from

FORMS = st.sampled_from(get_args(SpikeForm))
RECODINGS = st.sampled_from(["binary", "signed-digit"])
KINDS = st.sampled_from([("gif", 2), ("gif", 4), ("gif", 8), ("if", 1), ("ternary", 2)])


def centered(kind: tuple[str, int], recoding: str) -> SoftResetNeuron:
    return with_train(make_neuron(*kind), "centered", recoding)  # type: ignore[arg-type]


def coded(neuron: SoftResetNeuron, x: torch.Tensor, steps: int = 1) -> torch.Tensor:
    top = neuron.top(steps)
    theta, z = threshold_for_range(*token_range(x), top, signed=neuron.signed)
    return neuron.fired(neuron.encode(x, theta, z, steps), z)


@given(
    KINDS,
    RECODINGS,
    FORMS,
    st.floats(0, 300),
    st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8),
)
def test_no_count_costs_less(
    kind: tuple[str, int], recoding: str, form: SpikeForm, price: float, units: list[float]
) -> None:
    """Against a search through all counts, in exact arithmetic."""
    neuron = with_price(centered(kind, recoding), price, form)
    table = [int(n) for n in spikes_of_counts(form, neuron.recoding)]  # type: ignore[arg-type]
    one, zero, rounded = torch.tensor(1.0), torch.tensor(0), Fraction(whole_price(price))
    steps, middle = 4095 // neuron.levels, 2000
    z = zero if neuron.signed else torch.tensor(middle)
    count = neuron.fired(neuron.encode(torch.tensor(units), one, z, steps), z)
    for x, n in zip(units, count.tolist(), strict=True):
        size = abs(Fraction(x))

        def cost(m: int, size: Fraction = size) -> Fraction:
            return (size - m) ** 2 + rounded * table[m]

        assert n * x >= 0
        # decisions are rounded to multiples of 2⁻¹⁰
        apart = 2 * max(size, 1) / 1000 if form == "phase" else 0
        assert cost(abs(n)) <= min(map(cost, range(int(size) + 2))) + apart


@given(KINDS, RECODINGS, FORMS, st.integers(1, 3), st.integers(0, 10**6))
def test_spikes_fall_with_their_price_and_without_one_nothing_changes(
    kind: tuple[str, int], recoding: str, form: SpikeForm, steps: int, seed: int
) -> None:
    plain = centered(kind, recoding)
    assert with_price(plain, 0.0, form) is plain
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
    table = spikes_of_counts(form, plain.recoding)
    taken = [
        int(table[coded(with_price(plain, price, form), x, steps).abs().long()].sum())
        for price in (0.0, 0.25, 1.0, 2.5, 7.0, 30.0, 200.0, 1e5)
    ]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > 0
    if kind != ("gif", 8):
        assert taken[-1] < taken[0]


@given(RECODINGS, st.floats(0, 2000), st.sampled_from([1, 3, 15, 30, 255]))
def test_levels_do_not_depend_on_how_many_there_are(recoding: str, price: float, top: int) -> None:
    few = phase_levels(whole_price(price), recoding, top)  # type: ignore[arg-type]
    many = phase_levels(whole_price(price), recoding, 4095)  # type: ignore[arg-type]
    assert torch.equal(few.edges, many.edges[: len(few.edges)])
    assert torch.equal(few.counts, many.counts[: len(few.counts)])
    assert int(few.counts[-1]) >= top > int(few.counts[-2])
    assert bool((few.edges.diff() >= 0).all())


def test_corners_of_the_hull() -> None:
    spikes = spikes_of_counts("phase", "binary", 8)
    assert best_levels(0.0, spikes).counts.tolist() == list(range(9))
    assert best_levels(0.0, spikes).edges.tolist() == [n + 0.5 for n in range(8)]
    edges, counts = best_levels(1.0, spikes)
    assert counts.tolist() == [0, 1, 2, 4, 5, 6, 8], "3 and 7 cost more than they gain"
    assert edges.tolist() == [1.0, 1.5, 3.0, 5.0, 5.5, 6.75]
    edges, counts = best_levels(1.0, spikes_of_counts("binary", "binary", 4))
    assert counts.tolist() == [0, 1, 2, 3, 4]
    assert edges.tolist() == [1.0, 2.0, 3.0, 4.0], "all decisions move by half the price"


def test_a_price_that_cannot_be_is_refused() -> None:
    plain = make_neuron("gif", 4)
    with pytest.raises(ValueError, match="set train to centered"):
        with_price(plain, 1.0, "phase")
    with pytest.raises(ValueError, match="use neuron gif"):
        with_price(replace(make_neuron("gif-published", 4), centered=True), 1.0, "phase")
    for price in (-1.0, float("nan"), 1e9):
        with pytest.raises(ValueError, match="expected 0 to"):
            with_price(centered(("gif", 4), "binary"), price, "phase")


def test_a_neuron_that_encodes_by_itself_takes_none() -> None:
    class Own(SoftResetNeuron):
        def encode(self, *arguments: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().encode(*arguments)

    with pytest.raises(ValueError, match="encodes in a way of its own"):
        with_price(Own(levels=3, centered=True), 1.0, "phase")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"activations": {"spikes": 0.5}}, "set train to centered"),
        ({"activations": {"spikes_of": "binary"}}, "would have no effect while spikes is 0"),
        ({"activations": {"bits": 16, "spikes": 0.5}}, "would have no effect"),
        ({"train": "centered", "attention": {"query": {"bits": 4, "spikes": 1}}}, "query.spikes"),
        (
            {
                "train": "centered",
                "activations": {"spikes": 1},
                "attention": {
                    "key": {"bits": 4, "spikes": 1, "spikes_of": "binary"},
                    "value": {"bits": 4},
                },
            },
            "one budget",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(part: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe_from({"name": "r", "algorithm": "rtn", **part}, "here")


def test_a_recipe_without_a_budget_is_saved_as_before() -> None:
    assert not {"spikes", "spikes_of"} & ActivationRecipe().model_dump().keys()
    assert "spikes" not in AttentionRecipe().model_dump()["key"]
