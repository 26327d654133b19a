from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import spikellm
from conftest import first_blocks
from spikellm.algorithms.base import algorithms
from spikellm.algorithms.rtn import RoundToNearest
from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.attention import set_center_and_map
from spikellm.conversion.head_losses import AttentionCalls, HeadLosses, SurveyedHeads
from spikellm.conversion.step_shares import StepShares
from spikellm.core.errors import RecipeError
from spikellm.models.attention_interface import (
    find_attention,
    observing,
    spiking_attentions,
    uncoded,
    use_interface,
)
from spikellm.models.families import find_blocks
from spikellm.nn.attention import SpikingAttention
from spikellm.observers.head_moments import HeadMoments
from spikellm.recipe import ActivationRecipe, AttentionRecipe, LinearRecipe
from spikellm.recipe.load import load_recipe

SETTINGS = ("activations.allocation=model",)


def surveyed(
    name: str, sensitivity: float, outputs: int = 16, *, readers: tuple[str, ...] = ()
) -> SurveyedLayer:
    generator = torch.Generator().manual_seed(len(name))
    layer = nn.Linear(40, outputs, bias=False)
    layer.weight.data = torch.randn(outputs, 40, generator=generator)
    settings = load_recipe("w4a4-t2", SETTINGS).for_module(name)
    assert settings is not None
    sample = torch.randn(200, 40, generator=generator)
    return SurveyedLayer(
        name, layer, settings, None, torch.full((outputs,), sensitivity), sample, readers or (name,)
    )


def test_steps_go_where_the_loss_is() -> None:
    shares = StepShares(0)
    shares.look([surveyed("quiet", 1.0), surveyed("loud", 1e4)])
    assert shares.counts() == {
        "quiet": 0,
        "loud": 8,
    }, "a tenth of 80 channels, all of them in the layer that matters"


def test_cheap_layers_get_more() -> None:
    shares = StepShares(0)
    shares.look([surveyed("one", 1.0, 16)])
    shares.look([surveyed("wide", 0.5, 64)])
    counts = shares.counts()
    assert counts["one"] > 4 > counts["wide"], (
        "a step of the wide layer costs four times as much and gains twice as much"
    )
    cost = counts["one"] * 16 + counts["wide"] * 64
    assert cost <= 0.1 * 40 * 80 + 1


def test_layers_that_read_one_tensor_count_as_one() -> None:
    shares, readers = StepShares(0), ("k", "q")
    shares.look(
        [
            surveyed("q", 1.0, readers=readers),
            surveyed("k", 1.0, readers=readers),
            surveyed("o", 1.0),
        ]
    )
    counts = shares.counts()
    assert counts["q"] == counts["k"]


def heads(name: str, losses: tuple[float, float], cost: int = 10) -> SurveyedHeads:
    """K of an attention module with 40 channels a head."""
    settings = load_recipe(
        "spike-w4a4-t2", ["attention.key.allocation=model", "attention.key.salient_rate=0.25"]
    ).attention.key
    return SurveyedHeads(name, settings, 40, losses, cost)


def test_a_whole_tensor_may_take_more_steps() -> None:
    shares = StepShares(0)
    shares.look_at_heads([heads("loud.key", (4.0, 1.0)), heads("quiet.key", (0.4, 0.1))])
    shares.look_at_heads([heads("a.key", (0.2, 0.1)), heads("b.key", (0.1, 0.1))])
    assert shares.counts() == {"loud.key": 40, "quiet.key": 0, "a.key": 0, "b.key": 0}


def test_heads_and_layers_spend_one_budget() -> None:
    """A layer of 16 outputs takes 40 · 16 · 4 · 4 bit operations a token for all its channels, K
    here 160 · 4: a tenth and a quarter of them are 1,184, which K takes first if it gains more.
    """
    counts = {}
    for gain in (0.0, 1e9):
        shares = StepShares(0)
        shares.look([surveyed("layer", 1.0)])
        shares.look_at_heads([heads("a.key", (gain, gain / 4), cost=160)])
        counts[gain] = shares.counts()
    assert counts[0.0] == {"layer": 4, "a.key": 0}, "10,240 for 40 channels: 1,024 for 4"
    assert counts[1e9] == {"layer": 2, "a.key": 40}, "640 for K; 2 channels cost 512"


@pytest.mark.parametrize("part", ["key", "value"])
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_losses_of_heads_are_those_of_the_coded_module(part: str) -> None:
    model, _ = first_blocks(1)
    attention = find_blocks(model).modules[0].self_attn
    use_interface(model)
    (shape,) = find_attention(model).values()
    settings = load_recipe(
        "spike-w4a4-t2",
        [f"attention.{part}.allocation=model", "attention.rotate=true", "attention.center=true"],
    ).attention
    calls = AttentionCalls({"a": attention}, [1])
    generator = torch.Generator().manual_seed(0)
    with calls.hooks():
        for _ in range(3):
            model(torch.randint(0, 500, (2, 24), generator=generator), use_cache=False)
    assert len(calls.kept["a"]) == 1
    sensitivity = torch.rand(192, generator=generator)
    losses = HeadLosses("a", shape, settings, attention, calls.kept["a"], sensitivity)
    (found,) = losses.measure()
    assert found.name == f"a.{part}"
    assert found.channels == shape.key_channels
    assert found.cost == 6 * 24 * shape.key_channels * (4 if part == "key" else 16)
    assert not hasattr(attention, "spikes"), "the module is left as it was"
    (arguments, keywords) = calls.kept["a"][0]
    exact = attention(*arguments, **keywords)[0].float()
    for group, loss in zip((0, 1), found.losses, strict=True):
        own = ActivationRecipe(bits=4, salient_rate=0.1, salient_steps=2)
        attention.spikes = spikes = SpikingAttention(shape, one_part(part, own))
        spikes.set_groups(*(torch.full_like(one, group) for one in (spikes.key_group,) * 2))
        if part == "key":
            moments = HeadMoments()
            with uncoded(attention), observing(lambda _, seen: moments.update(seen)):  # noqa: B023
                attention(*arguments, **keywords)
            set_center_and_map(attention.spikes, moments)
        lost = (attention(*arguments, **keywords)[0].float() - exact).square() * sensitivity
        assert loss == pytest.approx(float(lost.sum() / 48), rel=1e-4)
        del attention.spikes
    assert found.losses[1] < 0.4 * found.losses[0], "two steps halve the error"


def one_part(part: str, own: ActivationRecipe) -> AttentionRecipe:
    """Attention of which one part alone is coded."""
    changed = {part: own, "rotate": part == "key", "center": part == "key"}
    return AttentionRecipe().model_copy(update=changed)


def test_steps_of_keys_are_shared_out(text_file: Path) -> None:
    model, tokenizer = first_blocks(3)
    settings = [
        "attention.key.allocation=model",
        "attention.key.salient_rate=0.34",
        "attention.key.salient_steps=2",
        "algorithm=rtn",
    ]
    found = spikellm.convert(
        model, tokenizer, "quarot-w4a4", str(text_file), samples=2, seqlen=64, settings=settings
    )
    assert found.summary.average_steps == 1.0, "steps of linear layers were not asked for"
    share = 0.34 * 32
    counts = [int(own.key_group.bool().sum(1)[0]) for own in spiking_attentions(model).values()]
    assert max(counts) > share > min(counts), f"unevenly: {counts}"
    assert sum(counts) == pytest.approx(3 * share, abs=2)


def test_the_mean_is_kept_over_the_model(text_file: Path) -> None:
    losses = []
    for over in ("layer", "model"):
        model, tokenizer = first_blocks(3)
        settings = [f"activations.allocation={over}", "activations.salient_rate=0.1"]
        found = spikellm.convert(
            model, tokenizer, "w4a4-t2", str(text_file), samples=8, seqlen=64, settings=settings
        )
        assert found.summary.average_steps == pytest.approx(1.1, abs=0.005)
        losses.append(found.blocks[-1].relative_loss)
        rates = {
            layer.name: layer.salient_channels / layer.in_features
            for layer in found.summary.layers
            if layer.spiking
        }
    assert losses[1] < losses[0]
    assert max(rates.values()) > 0.2
    assert min(rates.values()) == 0
    assert rates["model.layers.0.self_attn.q_proj"] == rates["model.layers.0.self_attn.v_proj"]


class Blind(RoundToNearest):
    """Asks for a survey, and looks at none of the layers."""

    def needs_survey(self, settings: LinearRecipe) -> bool:
        return True


def test_steps_are_shared_out_whatever_the_algorithm_looks_at(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(algorithms._entries, "rtn", Blind)
    model, tokenizer = first_blocks(1)
    settings = [*SETTINGS, "activations.salient_rate=0.1", "algorithm=rtn"]
    found = spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, settings=settings
    )
    assert found.summary.average_steps == pytest.approx(1.1, abs=0.01)


def test_recipes_are_checked() -> None:
    with pytest.raises(RecipeError, match="leave salient_for at input"):
        load_recipe("w4a4-t2", [*SETTINGS, "activations.salient_for=layer"])
    with pytest.raises(RecipeError, match="leave salient_for at input"):
        load_recipe(
            "w4a4-t2",
            ["overrides=[{match: '*', activations: {allocation: model, salient_for: layer}}]"],
        )
    with pytest.raises(RecipeError, match="allocation would have no effect"):
        load_recipe("rtn-w4a4", SETTINGS)
    with pytest.raises(RecipeError, match="allocation would have no effect"):
        load_recipe("quarot-w4a4", ["attention.key.allocation=model"])
