"""Sections that are the options of registered parts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from spikellm.core.errors import RecipeError
from spikellm.neurons import neurons
from spikellm.recipe import Recipe, TransformOptions, WeightOptions, register_options
from spikellm.recipe.base import AlgorithmOptions
from spikellm.recipe.load import load_recipe, preset_names
from spikellm.recipe.parts import DEFAULTS
from spikellm.saliency import Evidence, Selection, criteria


class Learned(AlgorithmOptions):
    name: Literal["learned"] = "learned"
    rate: float = Field(0.1, gt=0.0)

    def check(self, recipe: Any) -> None:
        if recipe.seed == 3:
            raise ValueError("algorithm.rate has no effect with seed 3")


class Float(WeightOptions):
    meets_spikes = False
    format: Literal["float"] = "float"
    bits: int = 8
    rounding: Literal["nearest", "random"] = "nearest"


class Shift(TransformOptions):
    name: Literal["shift"] = "shift"
    by: int = 1


@pytest.fixture
def parts() -> Iterator[None]:
    """Parts that another package might bring."""
    own = (Learned, Float, Shift)
    for options in own:
        register_options(options)
    yield
    for options in own:
        del options.registry._entries[options.part_name()]


def test_a_new_part_is_written_like_any_other(parts: None) -> None:
    recipe = load_recipe(
        "rtn-w4a4",
        [
            "algorithm={name: learned, rate: 0.2}",
            "weights=float",
            "activations.bits=16",
            "transforms=[residual-rotation, {name: shift, by: 3}]",
        ],
    )
    assert (recipe.algorithm.name, recipe.weights.format) == ("learned", "float")
    assert recipe.model_dump()["algorithm"] == {"name": "learned", "rate": 0.2}
    assert recipe.model_dump(mode="json")["transforms"][1] == {"name": "shift", "by": 3}
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert recipe.replaced({"algorithm.rate": 0.3}).model_dump()["algorithm"]["rate"] == 0.3
    for settings, message in (
        (["algorithm.rate=0"], "algorithm.rate: Input should be greater than 0"),
        (
            ["algorithm.percdamp=1"],
            r"unknown key 'algorithm.percdamp'.*; percdamp is an option of 'gptq'",
        ),
        (["activations={bits: 4}"], "weights of format float take inputs as they are"),
        (["seed=3"], "rate has no effect with seed 3"),
        (["transforms.shift.by=x"], r"transforms\.1\.by"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, settings)


def test_what_a_format_does_not_have_reads_as_nothing(parts: None) -> None:
    weights = load_recipe("w4a16", ["weights=float"]).weights
    assert (weights.bits, weights.symmetric, weights.group_size) == (8, False, None)
    assert (weights.salient_rate, weights.salient_steps, weights.saliency) == (0, 1, "second-order")
    assert (weights.invert, weights.budget, weights.allocation) == (False, None, "layer")
    assert (weights.top(2), weights.salient_bits) == (510, 8)
    with pytest.raises(AttributeError):
        weights.nothing  # noqa: B018


def test_ternary_weights_have_two_bits_a_step() -> None:
    weights = load_recipe("ternary-1.4").weights
    assert (weights.bits, weights.symmetric, weights.top(3)) == (2, True, 3)
    assert (weights.budget, weights.allocation) == (1.4, "model")


@pytest.mark.parametrize("name", preset_names())
def test_recipes_are_frozen_and_can_be_copied(name: str) -> None:
    recipe = load_recipe(name)
    assert hash(recipe) == hash(load_recipe(name))
    assert hash(recipe.weights) == hash(copy.deepcopy(recipe.weights))
    assert copy.deepcopy(recipe) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301
    with pytest.raises(ValueError, match="frozen"):
        recipe.algorithm.name = "x"


def test_a_recipe_of_nothing_has_the_default_parts() -> None:
    recipe = Recipe()
    assert recipe.algorithm.name == DEFAULTS["algorithm"]
    assert recipe.weights.format == DEFAULTS["weights"]
    assert recipe.transforms == ()
    assert load_recipe("rtn-w4a4", ["weights={}", "algorithm={}"]) == load_recipe(
        "rtn-w4a4"
    ).replaced({"name": "rtn-w4a4 with weights={}, algorithm={}"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm=gptqq"], "algorithm: unknown algorithm 'gptqq', did you mean 'gptq'"),
        (["algorithm={name: 3}"], "algorithm: unknown algorithm '3'"),
        (["algorithm=3"], "algorithm: Input should be"),
        (["weights.format=binary"], "weights: unknown weight format 'binary'"),
        (["transforms=[{sites: [up-down]}]"], r"transforms\.0: names no transform; set name"),
        (["transforms=residual-rotation"], "transforms: "),
        (["transforms=[turn]"], r"transforms\.0: unknown transform 'turn' .*residual-rotation"),
        (["transforms=[residual-rotation, residual-rotation]"], "'residual-rotation' twice"),
        (["transforms=[{name: residual-rotation, seed: 3}]"], r"unknown key 'transforms\.0\.seed'"),
        (
            ["transforms=[{name: equalization, sites: [query-key]}]"],
            "equalization of query-key has no effect: keys are not coded",
        ),
        (["transforms=[{name: equalization, sites: []}]"], "sites names no site"),
        (["transforms=[{name: equalization, sites: [up-down, up-down]}]"], "a site twice"),
        (["transforms=[{name: online-rotation, layers: []}]"], "layers names no layer"),
        (
            ["weights={format: ternary, bits: 2}"],
            "unknown key 'weights.bits'.*'affine' and 'partly",
        ),
        (["weights={format: ternary, allocation: model}"], "without a budget above 1"),
        (
            ["weights={format: ternary, budget: 1.4, salient_rate: 0.1, salient_steps: 2}"],
            "both say which columns take more steps",
        ),
        (["weights={format: partly-binary}"], r"weights\.salient_rate: Field required"),
        (["weights.salient_rate=0.1"], "no effect while salient_steps is 1"),
        (["weights.saliency=layer-loss"], "layer-loss ranks nothing; for weights take"),
        (["weights.saliency=magic"], "unknown saliency 'magic'"),
        (
            ["weights={bits: 8, salient_rate: 0.1, salient_steps: 2}"],
            "2 steps of 8-bit weights reach code 510; at most 255",
        ),
        (["transforms.online-rotation.choose=all"], "unknown entry 'online-rotation'"),
    ],
)
def test_what_does_not_belong_together(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("rtn-w4a4", settings)
    assert "\n" not in str(caught.value)


def test_another_part_keeps_the_options_that_both_have() -> None:
    recipe = load_recipe("gptq-w4a16", ["weights.group_size=64", "weights.bits=8"])
    changed = recipe.replaced({"weights.format": "ternary"}).weights
    assert (changed.format, changed.group_size, changed.bits) == ("ternary", 64, 2)
    first_named_last = ["weights.salient_rate=0.1", "weights.format=partly-binary"]
    changed = load_recipe(recipe, first_named_last).weights
    assert (changed.bits, changed.salient_rate, changed.group_size) == (8, 0.1, 64)
    assert load_recipe(recipe, ["weights=ternary"]).weights.group_size is None


def test_transforms_by_name() -> None:
    recipe = load_recipe("best-w4a4", ["transforms.online-rotation.layers=[down]"])
    online = recipe.transform("online-rotation")
    assert online is not None
    assert online.model_dump() == {
        "name": "online-rotation",
        "layers": ("down",),
        "choose": "loss",
        "center": True,
    }
    assert recipe.transform("shift") is None


def test_two_parts_of_one_name(parts: None) -> None:
    with pytest.raises(ValueError, match="algorithm 'learned' is registered twice"):

        @register_options
        class Other(AlgorithmOptions):
            name: Literal["learned"] = "learned"


def test_a_criterion_that_ranks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Can neither be inverted nor choose columns of weights, wherever it comes from."""

    def halves(evidence: Evidence) -> Selection:
        salient = torch.arange(evidence.x.shape[1]) < evidence.count
        return Selection(salient, salient)

    monkeypatch.setitem(criteria._entries, "halves", halves)
    salient = ["activations.salient_rate=0.1", "activations.saliency=halves"]
    load_recipe("w4a4-t2", salient)
    with pytest.raises(RecipeError, match="halves ranks nothing, .* saliency that ranks: expected"):
        load_recipe("w4a4-t2", [*salient, "activations.invert=true"])
    load_recipe("w4a4-t2", [salient[0], "activations.saliency=rms", "activations.invert=true"])
    with pytest.raises(RecipeError, match="halves ranks nothing; for weights take"):
        load_recipe("spike-w2a16", ["weights.saliency=halves"])


def test_neurons_of_attention_are_those_that_unroll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(neurons._entries, "mine", neurons["gif"])
    setting = "attention.key={bits: 4, neuron: gif-published, salient_rate: 0.1, salient_steps: 2}"
    with pytest.raises(RecipeError, match="with 4 bits attention takes gif or mine"):
        load_recipe("spike-w4a4-t2", [setting])
