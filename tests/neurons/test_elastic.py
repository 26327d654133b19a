"""The elastic bi-spiking neuron counts what its leaky membrane fires."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.neurons import make_neuron
from spikellm.neurons.elastic import elastic_levels
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.head_codec import HeadCoder
from spikellm.recipe import ActivationRecipe, AttentionRecipe

ONE, NONE = torch.tensor(1.0), torch.tensor(0)
REPAIRED, PUBLISHED = make_neuron("elastic", 2), make_neuron("elastic-published", 2)


def fired(x: float, steps: int) -> list[int]:
    """Spikes by the equations, in exact rational arithmetic; α is ``steps``, so that θ is 1."""
    m, found = Fraction(0), []
    for _ in range(steps):
        kept = 0 if found and found[-1] else 1
        m = m / 4 * kept + Fraction(x)
        spike = (1 if m > 0 else -1) if abs(m) * 2 >= steps else 0
        found.append(spike)
    return found


@given(st.integers(1, 40), st.data())
def test_counts_and_membrane_follow_the_equations(steps: int, data: st.DataObject) -> None:
    edges = elastic_levels(steps).edges
    edge = data.draw(st.sampled_from(edges.tolist()))
    near = torch.tensor([edge, edge]).nextafter(torch.tensor([0.0, 1e9]))
    drawn = data.draw(st.floats(-2.0 * steps, 2.0 * steps, width=32))
    values = [edge, *near.tolist(), 0.375 * steps, 0.5 * steps, drawn]
    x = torch.tensor([*values, *(-one for one in values)])
    trace = REPAIRED.simulate(x, ONE, NONE, steps, "constant")
    expected = torch.tensor([fired(one, steps) for one in x.tolist()]).T
    assert torch.equal(trace.spikes.long(), expected)
    assert torch.equal(trace.spikes.sum(0, dtype=torch.int32), REPAIRED.encode(x, ONE, NONE, steps))
    assert torch.equal(trace.membrane, trace.charged * (trace.spikes == 0))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 255])
def test_the_count_grows_with_the_current(steps: int) -> None:
    x = torch.linspace(-1.2 * steps, 1.2 * steps, 4001)
    count = REPAIRED.encode(x, ONE, NONE, steps)
    assert bool((count.diff() >= 0).all())
    assert torch.equal(count, -REPAIRED.encode(-x, ONE, NONE, steps))
    assert int(count.max()) == steps


def test_levels_of_four_steps() -> None:
    levels = elastic_levels(4)
    assert levels.counts.tolist() == [0, 1, 2, 4]
    expected = torch.tensor([4 * 32 / 85, 4 * 2 / 5, 4 / 2])
    torch.testing.assert_close(levels.edges, expected, rtol=1e-7, atol=0)


def test_one_step_is_ternary() -> None:
    x, ternary = torch.randn(1000), make_neuron("ternary", 2)
    assert torch.equal(REPAIRED.encode(x, ONE, NONE), ternary.encode(x, ONE, NONE))


def test_the_published_reset_remembers_what_it_should_forget() -> None:
    """After a negative spike potential is kept, and grows where the amplitude is above 2."""
    theta = torch.tensor(10.0)
    x = torch.tensor([41.0, -41.0])
    trace = PUBLISHED.simulate(x, theta, NONE, 8, "constant")
    assert float(trace.charged[-1, 1]) < -1e6
    assert float(trace.charged[-1, 0]) == pytest.approx(41.0)
    repaired = REPAIRED.simulate(x, theta, NONE, 8, "constant")
    assert torch.equal(repaired.charged[:, 0], -repaired.charged[:, 1])
    small = torch.tensor([0.05, -0.05]) * 80  # of an amplitude of 80: silent, and grows
    assert REPAIRED.encode(small, theta, NONE, 8).tolist() == [0, 0]
    assert PUBLISHED.encode(small, theta, NONE, 8).tolist() != [0, 0]


def test_spikes_of_other_widths_are_refused() -> None:
    for name in ("elastic", "elastic-published"):
        with pytest.raises(ValueError, match="2 bits"):
            make_neuron(name, 4)


@pytest.mark.parametrize("trained", [False, True])
def test_heads_hold_gradients_back_too(trained: bool) -> None:
    part = {"bits": 2, "neuron": "elastic", "symmetric": True, "threshold_from": "mean"}
    recipe = AttentionRecipe.model_validate({"query": part, "key": part, "value": part})
    spikes = SpikingAttention(HeadShape(1, 4, 4), recipe)
    if trained:
        assert spikes.share_ranges("key").tolist() == [2.0]
        spikes.get_buffer("key_share").requires_grad_()
    x = torch.tensor([0.5, -0.5, 0.1, 3.0]).view(1, 1, 1, 4).requires_grad_()
    coder = HeadCoder(recipe.key, spikes.key_group)
    coded = spikes._through("key", coder, x)
    coded.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]
    assert coded.flatten().tolist() == [0.0, 0.0, 0.0, 2.0625], "2.05, as a row of a cache keeps it"


def test_training_holds_gradients_back_beyond_the_amplitude() -> None:
    settings = ActivationRecipe.model_validate(
        {"bits": 2, "neuron": "elastic", "symmetric": True, "steps": 2, "threshold_from": "mean"}
    )
    x = torch.tensor([[0.5, -0.5, 0.1, 3.0]], requires_grad=True)
    InputCoder(settings, torch.zeros(4, dtype=torch.uint8))(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]
