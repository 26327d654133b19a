"""One budget of spikes over the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import spikellm
from conftest import first_blocks
from spikellm.algorithms.survey import SurveyedLayer
from spikellm.commands.inspect import prices_in_words
from spikellm.conversion.head_losses import PricedLosses, SurveyedHeads
from spikellm.conversion.spike_prices import prices_of
from spikellm.conversion.spike_shares import SpikeShares
from spikellm.core.errors import RequestError
from spikellm.models.attention_interface import spiking_attentions
from spikellm.models.train_summary import spike_prices
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.operations import count_operations
from spikellm.recipe import AttentionRecipe
from spikellm.recipe.load import load_recipe
from spikellm.saliency.allocation import choose_within


def surveyed(name: str, sensitivity: float) -> SurveyedLayer:
    """A layer with a budget of 0.8 phase spikes a value."""
    generator = torch.Generator().manual_seed(len(name))
    layer = nn.Linear(40, 16, bias=False)
    layer.weight.data = torch.randn(16, 40, generator=generator)
    own = load_recipe("w4a4-t2", [PLAIN]).for_module(name)
    assert own is not None
    sample = torch.randn(200, 40, generator=generator)
    weights = torch.full((16,), sensitivity)
    return SurveyedLayer(name, layer, own, None, weights, sample, (name,))


PLAIN = "activations={bits: 4, train: centered, spikes: 0.8}"


def test_spikes_go_where_the_loss_is() -> None:
    shares = SpikeShares()
    layers = [surveyed("quiet", 1.0), surveyed("loud", 1e3)]
    shares.look(layers)
    found = shares.codings()
    assert "loud" not in found or found["loud"].price < found["quiet"].price / 4
    assert found["quiet"].price > 1


def spikes_of(layers: Sequence[SurveyedLayer], found: dict[str, Any]) -> float:
    """Phase spikes a value of the samples."""
    taken = []
    for layer in layers:
        price = found[layer.name].price if layer.name in found else 0.0
        groups = torch.zeros(40, dtype=torch.uint8)
        coder = InputCoder(layer.settings.activations, groups, price=price)
        counts = coder.counts(layer.sample).abs().int()
        taken.append(float(sum((counts >> place & 1) for place in range(4)).float().mean()))
    return sum(taken) / len(taken)


@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9, 1.1])
def test_the_budget_is_met_on_the_sample(budget: float) -> None:
    shares = SpikeShares()
    layers = [_with(surveyed("a" * n, 2.0**n), budget) for n in range(1, 9)]
    shares.look(layers)
    assert 0.93 * budget <= spikes_of(layers, shares.codings()) <= budget


def _with(layer: SurveyedLayer, budget: float) -> SurveyedLayer:
    activations = layer.settings.activations.model_copy(update={"spikes": budget})
    settings = layer.settings.model_copy(update={"activations": activations})
    return SurveyedLayer(
        layer.name, layer.module, settings, None, layer.sensitivity, layer.sample, (layer.name,)
    )


def test_a_budget_beyond_all_spikes_changes_nothing() -> None:
    shares = SpikeShares()
    shares.look([_with(surveyed("a", 1.0), 9.0)])
    assert shares.codings() == {}
    assert SpikeShares().codings() == {}


def test_too_small_a_budget_is_refused() -> None:
    shares = SpikeShares()
    shares.look([_with(surveyed("a", 1.0), 0.001)])
    with pytest.raises(RequestError, match=r"asks for 0\.001 spikes a value .* ask for more"):
        shares.codings()


def test_heads_spend_the_same_budget() -> None:
    settings = load_recipe("best-w4a4", ["attention.key.spikes=0.61"]).attention.key
    few = PricedLosses(
        [0.0, 1.0], torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 0.2]).double()
    )
    many = few._replace(losses=few.losses * 100)
    shares = SpikeShares()
    shares.look_at_heads(
        [
            SurveyedHeads("a.key", settings, 40, (0, 0), 10, 10, few),
            SurveyedHeads("b.key", settings, 40, (0, 0), 10, 10, many),
        ]
    )
    found = shares.codings()
    assert list(found) == ["a.key"], "1.0 and 0.2 spikes a value: b, which loses more, stays"
    assert found["a.key"].price == 1.0


def test_prices_reach_silence() -> None:
    for form in ("binary", "phase"):
        for bits in (1, 4, 8):
            own = load_recipe(
                "w4a4-t2",
                [f"activations={{bits: {bits}, train: centered, spikes: 1, spikes_of: {form}}}"],
            ).activations
            prices = prices_of(own)
            assert prices == sorted(prices)
            assert prices[0] == 0.0


tables = st.lists(
    st.lists(
        st.tuples(st.floats(0, 9).map(float), st.floats(0.1, 9).map(float)), min_size=1, max_size=4
    ),
    min_size=1,
    max_size=4,
)


@given(tables, st.floats(0, 40))
def test_ways_fit_the_budget_and_gain(
    drawn: list[list[tuple[float, float]]], budget: float
) -> None:
    losses = [torch.tensor([loss for loss, _ in one]).double() for one in drawn]
    costs = [torch.tensor([cost for _, cost in one]).double() for one in drawn]
    chosen = choose_within(losses, costs, budget)
    least = sum(float(cost.min()) for cost in costs)
    spent = sum(float(cost[place]) for cost, place in zip(costs, chosen, strict=True))
    assert spent <= max(budget, least) + 1e-9
    more = choose_within(losses, costs, 1e9)
    assert [float(x[p]) for x, p in zip(losses, more, strict=True)] == [
        float(x.min()) for x in losses
    ]


@pytest.fixture(scope="module")
def sparse(text_file: Path) -> Any:
    model, tokenizer = first_blocks(1)
    part = "{bits: 4, train: centered, spikes: 0.8}"
    settings = (
        "activations={bits: 4, train: centered, spikes: 0.8}",
        f"attention={{key: {part}, value: {part}, rotate: true, center: true}}",
    )
    spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=4, seqlen=64, settings=settings
    )
    return model


def tokens() -> torch.Tensor:
    return torch.randint(2, 2000, (2, 64), generator=torch.Generator().manual_seed(0))


def test_a_model_takes_about_as_many_spikes_as_asked_for(sparse: Any) -> None:
    linear = count_operations(sparse, [tokens()])["prefill"].total("linear")
    assert linear.sops["phase"] / linear.macs == pytest.approx(0.8, abs=0.15)
    prices = [layer.price for layer in sparse.modules() if isinstance(layer, SpikingLinear)]
    assert len({*prices}) > 2
    for own in spiking_attentions(sparse).values():
        assert isinstance(own.settings, AttentionRecipe)
        assert own.price("key") > 0 or own.price("value") > 0
        assert own.price("query") == 0


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_sparse_model_runs_alike_in_all_modes_and_from_a_folder(
    sparse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = sparse(tokens(), use_cache=False).logits
    for mode in ("stepped", "binary", "phase"):
        set_execution_mode(sparse, mode)  # type: ignore[arg-type]
        assert torch.equal(sparse(tokens(), use_cache=False).logits, merged), mode
    set_execution_mode(sparse, "merged")
    _, tokenizer = first_blocks(1)
    spikellm.save(sparse, tokenizer, tmp_path / "out")
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    again, _ = spikellm.load(tmp_path / "out")
    torch.testing.assert_close(again(tokens(), use_cache=False).logits, merged)
    state = sparse.state_dict()
    found = {name: value for name, value in again.state_dict().items() if "price" in name}
    assert found
    assert all(torch.equal(state[name], value) for name, value in found.items())


def test_a_damaged_price_is_told(sparse: Any) -> None:
    from spikellm.nn.validation import validation_error

    layer = next(one for one in sparse.modules() if isinstance(one, SpikingLinear))
    price, kept = layer.get_buffer("spike_price"), layer.price
    for value in (float("nan"), -1.0, 1e30):
        price.fill_(value)
        assert "spike_price holds" in str(validation_error(sparse))
    price.fill_(kept)
    assert validation_error(sparse) is None


def test_prices_are_told(sparse: Any) -> None:
    found = spike_prices(sparse)
    assert len(found) == 7 + 2
    assert {name.rpartition(".")[2] for name in found} >= {"key", "value", "down_proj"}
    words = prices_in_words(found)
    assert words.startswith(f"price of a spike {min(found.values()):.3g} to ")
    assert words.endswith(f"in 9 places, none in {sum(one == 0 for one in found.values())} of them")
