"""Tokens are chosen as the options say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from spikellm.serving.sampling import Sampling, logprob_of

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0, -2.0])


def drawn(sampling: Sampling, count: int = 4000, seen: Counter[int] | None = None) -> Tensor:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    found = [sampling.choose(LOGITS, seen or Counter(), generator) for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=len(LOGITS)) / count


def test_greedy_takes_the_likeliest() -> None:
    assert drawn(Sampling(temperature=0), 3)[4] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    wanted = (LOGITS / temperature).softmax(0)
    assert (drawn(Sampling(temperature=temperature)) - wanted).abs().max() < 0.03


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    assert set(drawn(Sampling(top_k=2)).nonzero().flatten().tolist()) == {0, 4}
    shares = LOGITS.softmax(0)
    assert shares[4] < 0.7 < shares[4] + shares[0]
    assert set(drawn(Sampling(top_p=0.7)).nonzero().flatten().tolist()) == {0, 4}
    assert drawn(Sampling(top_p=0.01), 50)[4] == 1


def test_penalties_and_biases_are_taken_off_and_added() -> None:
    seen = Counter({4: 3, 0: 1})
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=1.0, bias={3: 2.5})
    wanted = LOGITS - torch.tensor([1.5, 0, 0, -2.5, 3.5, 0])
    assert (drawn(sampling, seen=seen) - wanted.softmax(0)).abs().max() < 0.03
    assert LOGITS[4] == 3, "what was given stays as it was"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-40),
        Sampling(temperature=2e-4, frequency_penalty=-2, bias={1: 100.0}),
        Sampling(top_p=1e-60),
    ],
)
def test_extremes_take_the_likeliest(sampling: Sampling) -> None:
    assert drawn(sampling, 20, Counter({1: 5})).max() == 1


def test_one_seed_draws_the_same() -> None:
    def some(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [Sampling().choose(LOGITS, Counter(), generator) for _ in range(20)]

    assert some(1) == some(1)
    assert some(1) != some(2)


def test_logarithms_are_those_of_the_model() -> None:
    found = logprob_of(LOGITS, 1, 2)
    wanted = LOGITS.log_softmax(0)
    assert found.logprob == pytest.approx(float(wanted[1]))
    assert [token for token, _ in found.top] == [4, 0]
    assert logprob_of(LOGITS, 1, 0).top == ()
