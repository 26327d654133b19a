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
from spikellm.conversion.step_shares import StepShares
from spikellm.core.errors import RecipeError
from spikellm.recipe import LinearRecipe
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
    with pytest.raises(RecipeError, match="expected at most 0.5"):
        load_recipe("w4a4-t2", [*SETTINGS, "activations.salient_rate=0.7"])
    with pytest.raises(RecipeError, match="allocation would have no effect"):
        load_recipe("rtn-w4a4", SETTINGS)
    with pytest.raises(RecipeError, match=r"key\.allocation has no effect"):
        load_recipe("spike-w4a4-t2", ["attention.key.allocation=model"])
