from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikellm.neurons import make_neuron
from spikellm.quantization.thresholds import threshold_for_range, token_range
from spikellm.saliency import Evidence, choose, criteria, salient_count
from spikellm.saliency import layer_loss as layer_loss_module
from spikellm.saliency.base import ranking
from spikellm.saliency.expected_error import expected_error
from spikellm.saliency.first_order import first_order, first_order_absolute
from spikellm.saliency.layer_loss import least_losses, loss_of_cuts
from spikellm.saliency.value_range import maximum, rms


def evidence(
    seed: int = 0,
    *,
    tokens: int = 50,
    channels: int = 12,
    outliers: int = 0,
    **changes: Any,
) -> Evidence:
    """Three of the channels are to be chosen, with two steps and a range of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    weight = torch.randn(9, channels, generator=generator) * torch.rand(
        channels, generator=generator
    )
    x[:, :outliers] *= 30
    weight[:, :outliers] /= 30
    case = Evidence(
        x=x,
        weight=weight,
        neuron=make_neuron("gif", 4),
        steps=1,
        salient_steps=2,
        count=3,
        split=True,
        symmetric=False,
        invert=False,
        generator=torch.Generator().manual_seed(seed),
    )
    return replace(case, **changes)


def output_error(case: Evidence, salient: torch.Tensor, own: torch.Tensor) -> float:
    """Measured, with real codes: mean squared error of the layer's output."""
    coded = torch.empty_like(case.x)
    for members in (~own, own):
        low, high = token_range(case.x[:, members])
        for steps, part in (
            (case.steps, members & ~salient),
            (case.salient_steps, members & salient),
        ):
            theta, baseline = threshold_for_range(low, high, case.neuron.levels * steps)
            coded[:, part] = case.neuron.decode(
                case.neuron.encode(case.x[:, part], theta, baseline, steps), theta, baseline
            )
    return float(((coded - case.x) @ case.weight.T).square().sum(1).mean())


def test_first_order_is_half_the_gradient_of_the_output_energy() -> None:
    case = evidence()
    x = case.x.clone().requires_grad_()
    (x @ case.weight.T).square().sum().backward()
    product = 0.5 * x.grad * case.x  # type: ignore[operator]
    torch.testing.assert_close(first_order(case), product.mean(0))
    torch.testing.assert_close(first_order_absolute(case), product.abs().mean(0))


def test_first_order_cannot_see_outlier_channels() -> None:
    case, scaled = evidence(outliers=0), evidence(outliers=3)
    torch.testing.assert_close(first_order(case), first_order(scaled), rtol=1e-4, atol=1e-5)
    assert set(maximum(scaled).topk(3).indices.tolist()) == {0, 1, 2}
    assert set(rms(scaled).topk(3).indices.tolist()) == {0, 1, 2}


def test_expected_error_is_the_measured_one_channel_by_channel() -> None:
    case = evidence()
    theta, baseline = threshold_for_range(*token_range(case.x), case.neuron.levels)
    coded = case.neuron.decode(case.neuron.encode(case.x, theta, baseline), theta, baseline)
    for channel, score in enumerate(expected_error(case).tolist()):
        alone = case.x.clone()
        alone[:, channel] = coded[:, channel]
        loss = float(((alone - case.x) @ case.weight.T).square().sum(1).mean())
        assert score == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    ("split", "steps", "salient_steps"), [(True, 1, 2), (True, 1, 1), (True, 2, 4), (False, 1, 3)]
)
def test_layer_loss_of_every_cut_against_loops(split: bool, steps: int, salient_steps: int) -> None:
    case = evidence(outliers=2, count=4, split=split, steps=steps, salient_steps=salient_steps)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    energy = case.column_energy.double()
    for cut, loss in enumerate(loss_of_cuts(case, order).tolist()):
        own = order[:cut].tolist()
        others = [c for c in range(12) if c not in own]
        finer = sorted(others, key=lambda c: -float(energy[c]))[: case.count - cut]
        expected = 0.0
        for channel in range(12):
            group = own if channel in own else others
            spread = case.x[:, group].amax(1).clamp(min=0) - case.x[:, group].amin(1).clamp(max=0)
            horizon = salient_steps if channel in own or channel in finer else steps
            expected += float(
                (spread.double() / (15 * horizon)).square().mean() / 12 * energy[channel]
            )
        assert loss == pytest.approx(expected, rel=1e-6)
    assert len(loss_of_cuts(case, order)) == (case.count + 1 if split else 1)


def test_symmetric_ranges_are_those_of_the_coder() -> None:
    case = evidence(outliers=1, symmetric=True, count=4)
    order = maximum(case).argsort(descending=True)
    plain = loss_of_cuts(replace(case, symmetric=False), order)
    reach = 2 * case.x[:, order[:2]].abs().amax(1), 2 * case.x[:, order[2:]].abs().amax(1)
    energy = case.column_energy[order].double()
    finer = torch.zeros(12, dtype=torch.bool).index_fill(0, 2 + energy[2:].topk(2).indices, True)
    weighted = reach[0].double().square().mean() * energy[:2].sum() / 4
    weighted += reach[1].double().square().mean() * (energy[2:].sum() - 0.75 * energy[finer].sum())
    assert float(loss_of_cuts(case, order)[2]) == pytest.approx(
        float(weighted) / (12 * 15**2), rel=1e-6
    )
    assert not torch.allclose(plain, loss_of_cuts(case, order))
    assert not torch.allclose(expected_error(case), expected_error(replace(case, symmetric=False)))


@pytest.mark.parametrize("outliers", [0, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_layer_loss_beats_the_other_criteria_where_it_counts(outliers: int, seed: int) -> None:
    """Measured output error, not the estimate that the criterion itself minimises."""
    case = evidence(seed, tokens=400, channels=60, outliers=outliers, count=6)
    best = output_error(case, *criteria["layer-loss"](case))
    for name in ("random", "first-order", "maximum", "rms", "magnitude"):
        assert best <= 1.03 * output_error(case, *criteria[name](case)), name


def test_layer_loss_gives_outliers_their_own_range() -> None:
    salient, own = criteria["layer-loss"](evidence(outliers=3, tokens=200, channels=60, count=6))
    assert own.nonzero().flatten().tolist() == [0, 1, 2]
    assert int(salient.sum()) == 6
    assert bool((own <= salient).all())


@pytest.mark.parametrize("name", criteria.names())
def test_every_criterion_chooses_its_count_and_is_repeatable(name: str) -> None:
    first, second = criteria[name](evidence()), criteria[name](evidence())
    assert torch.equal(first.salient, second.salient)
    assert torch.equal(first.own_range, second.own_range)
    assert int(first.salient.sum()) == 3
    assert bool((first.own_range <= first.salient).all())
    shared = criteria[name](replace(evidence(), split=False))
    assert int(shared.own_range.sum()) == 0


def test_inverted_ranking_takes_the_other_end() -> None:
    case = evidence()
    lowest = criteria["maximum"](replace(case, invert=True)).salient
    assert set(lowest.nonzero().flatten().tolist()) == set(
        maximum(case).topk(3, largest=False).indices.tolist()
    )


@given(st.floats(0, 0.999), st.integers(2, 300))
def test_at_least_one_channel_and_never_all(rate: float, channels: int) -> None:
    count = salient_count(rate, channels)
    assert count == 0 if rate == 0 else 1 <= count < channels
    if rate > 0:
        assert abs(count - rate * channels) <= 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 12), st.booleans())
def test_choice_is_stable(scores: list[int], count: int, invert: bool) -> None:
    order = sorted(range(len(scores)), key=lambda c: (scores[c] if invert else -scores[c], c))
    mask = choose(torch.tensor(scores), count, invert=invert)
    assert set(mask.nonzero().flatten().tolist()) == set(order[:count])


@pytest.mark.parametrize("split", [True, False])
def test_losses_of_many_counts_are_those_of_each(
    split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_loss_module, "_CUTS", 3)
    case, counts = evidence(outliers=2, split=split), [0, 1, 4, 7, 12]
    each = [
        min(
            float(loss_of_cuts(replace(case, count=count), ranking(scores)).min())
            for scores in (maximum(case), rms(case), case.column_energy)
        )
        for count in counts
    ]
    assert least_losses(case, counts) == pytest.approx(each, rel=1e-9)
