"""Thresholds that follow means, and neurons that need training: what recipes may say of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from spikellm.core.errors import RecipeError
from spikellm.recipe import ActivationRecipe, Recipe, recipe_from
from spikellm.recipe.load import load_recipe

TERNARY: dict[str, Any] = {"bits": 2, "neuron": "ternary", "symmetric": True}
ELASTIC: dict[str, Any] = {"bits": 2, "neuron": "elastic", "symmetric": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean_factor": 3.0}, "set threshold_from to mean"),
        ({"threshold_from": "mean"}, "set symmetric to true"),
        ({**TERNARY, "threshold_from": "mean", "mean_factor": 16.0}, "0.0625 to 15.9375"),
        ({**TERNARY, "threshold_from": "mean", "mean_factor": 0.05}, "0.0625 to 15.9375"),
        ({**TERNARY, "threshold_from": "mean", "mean_factor": 1.9}, "the next is 1.875"),
        (
            {**TERNARY, "threshold_from": "mean", "mean_factor": 3.0, "search_range": True},
            "search_range looks for the factor",
        ),
        ({"bits": 16, "threshold_from": "mean"}, "threshold_from would have no effect"),
    ],
)
def test_thresholds_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ActivationRecipe.model_validate(settings)


def test_what_is_not_set_is_not_saved() -> None:
    assert not {"threshold_from", "mean_factor"} & set(ActivationRecipe().model_dump())
    assert "untrained" not in Recipe().model_dump()
    settings = ActivationRecipe.model_validate({**TERNARY, "threshold_from": "mean"})
    assert settings.range_share == 32
    assert settings.model_dump()["threshold_from"] == "mean"


def test_ranges_over_the_sequence_have_no_mean() -> None:
    with pytest.raises(RecipeError, match="leave key_axis out"):
        load_recipe(
            "w4a4-t2",
            [
                "attention.key={bits: 4, symmetric: true, threshold_from: mean}",
                "attention.value.bits=4",
                "attention.key_axis=sequence",
            ],
        )


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ({"activations": ELASTIC}, "activations.neuron 'elastic'"),
        ({"attention": {"key": ELASTIC, "value": TERNARY}}, "attention.key.neuron 'elastic'"),
        (
            {"overrides": [{"match": "*.down_proj", "activations": ELASTIC}]},
            r"override '\*.down_proj': activations.neuron 'elastic'",
        ),
    ],
)
def test_neurons_that_need_training_are_refused_without(part: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError, match=f"{where} needs training") as refused:
        recipe_from({"name": "r", **part}, "here")
    assert "\n" not in str(refused.value)
    assert recipe_from({"name": "r", "untrained": True, **part}, "here").untrained


def test_untrained_without_effect_is_refused() -> None:
    with pytest.raises(RecipeError, match="untrained would have no effect"):
        recipe_from({"name": "r", "untrained": True}, "here")


def test_training_is_what_they_need() -> None:
    trained = {"name": "r", "activations": ELASTIC, "training": {"name": "end-to-end"}}
    assert recipe_from(trained, "here").training is not None
    with pytest.raises(RecipeError, match="no effect beside training"):
        recipe_from({**trained, "untrained": True}, "here")
    preset = load_recipe("elastic-ternary-t2")
    assert preset.activations.neuron == "elastic"
    with pytest.raises(RecipeError, match="needs training"):
        load_recipe("elastic-ternary-t2", ["training=null"])


STATIC = {"threshold_from": "calibration"}
FINER = {"salient_rate": 0.1, "salient_steps": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 16, "clusters": 8}, "clusters would have no effect"),
        ({**STATIC, "mean_factor": 3.0}, "set threshold_from to mean"),
        ({**STATIC, "token_steps": 2}, "leave token_steps out"),
        ({**STATIC, "train": "centered", "spikes": 1.0}, "threshold_from is calibration, and a"),
        ({"clusters": 4, "train": "centered", "spikes": 1.0}, "clusters is 4, and a budget"),
        ({"clusters": 4, **FINER, "thresholds": "shared"}, "thresholds cannot be chosen with"),
        ({"clusters": 4, **FINER, "saliency": "rms"}, "saliency cannot be chosen with clusters"),
        ({"clusters": 4, **FINER, "allocation": "model"}, "allocation cannot be chosen with"),
        ({"clusters": 4, "salient_rate": 0.1}, "raise salient_steps"),
        ({"clusters": 65}, "less than or equal to 64"),
    ],
)
def test_clusters_and_constants_are_refused_where_they_cannot_be(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        ActivationRecipe.model_validate(settings)
    assert len(refused.value.errors()) == 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"attention": {"key": {"bits": 4, "clusters": 2}, "value": {"bits": 4}}},
            "key.clusters is for linear layers",
        ),
        (
            {"attention": {"key": {"bits": 4, **STATIC}, "value": {"bits": 4}}},
            "key.threshold_from: calibration is for linear layers",
        ),
        (
            {"activations": STATIC, "algorithm": "omniquant"},
            "cannot be learned around: omniquant goes on",
        ),
        (
            {
                "overrides": [{"match": "*.down_proj", "activations": STATIC}],
                "training": {"name": "end-to-end"},
            },
            "set training.shares to false",
        ),
    ],
)
def test_other_sections_refuse_them_too(part: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        recipe_from({"name": "r", **part}, "here")
    assert "\n" not in str(refused.value)


def test_groups_of_clusters() -> None:
    plain = ActivationRecipe.model_validate({"clusters": 3})
    assert (plain.group_ranges, plain.group_steps) == ((0, 1, 2), (1, 1, 1))
    finer = ActivationRecipe.model_validate({"clusters": 2, **FINER})
    assert (finer.group_ranges, finer.group_steps) == ((0, 0, 1, 1), (1, 2, 1, 2))
    assert "clusters" not in ActivationRecipe().model_dump()
    assert plain.model_dump()["clusters"] == 3
