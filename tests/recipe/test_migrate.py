"""Recipes of version 1.

``fixtures/v1/recipes`` are its presets, ``printed`` what it printed of some, every field named;
``fixtures/v2/recipes`` are presets of version 2 that have changed since.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from spikellm.core import warn
from spikellm.core.errors import RecipeError, RequestError
from spikellm.recipe import Recipe, recipe_from
from spikellm.recipe.load import load_recipe, preset_names
from spikellm.recipe.migrate import is_old, migrated
from spikellm.recipe.settings import require_apart

V1 = Path(__file__).parents[1] / "fixtures" / "v1"
V2 = V1.with_name("v2")
PRESETS = sorted(path.stem for path in (V1 / "recipes").iterdir())
PRINTED = sorted(path.stem for path in (V1 / "printed").iterdir())


@pytest.fixture
def notices(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """Warnings of a process that has given none yet."""
    monkeypatch.setattr(warn, "_said", set())
    caplog.set_level(logging.WARNING, "spikellm")
    return caplog


def unnamed(recipe: Recipe) -> Recipe:
    return recipe.replaced({"name": "", "description": ""})


def as_it_was(name: str) -> Recipe:
    """A preset as version 2 first had it."""
    changed = V2 / "recipes" / f"{name}.yaml"
    found = load_recipe(changed if changed.exists() else name)
    return found.replaced({"train": "published"})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_version_1_are_those_of_version_2(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(V1 / "recipes" / f"{name}.yaml")
    assert recipe == as_it_was(name)
    (tmp_path / "new.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "new.yaml") == recipe


def test_no_preset_of_version_1_is_gone() -> None:
    assert set(PRESETS) <= set(preset_names())
    assert len(PRESETS) == 36


@pytest.mark.parametrize("name", PRINTED)
def test_recipes_that_name_every_field(name: str) -> None:
    assert unnamed(load_recipe(V1 / "printed" / f"{name}.yaml")) == unnamed(as_it_was(name))


def test_one_notice_names_the_file_and_how_to_get_the_new_one(
    notices: pytest.LogCaptureFixture,
) -> None:
    for name in ("rtn-w4a4", "gptq-w4a16", "quarot-w4a4"):  # the first is of both versions
        load_recipe(V1 / "recipes" / f"{name}.yaml")
    path = V1 / "recipes" / "gptq-w4a16.yaml"
    assert notices.messages == [
        f"spikellm: recipe file {path} is of version 1, and is read as version 2; `spikellm recipes"
        f" {path}` prints it as version 2"
    ]


@pytest.mark.parametrize("name", preset_names())
def test_presets_give_no_notice(name: str, notices: pytest.LogCaptureFixture) -> None:
    load_recipe(name)
    assert not notices.messages


@pytest.mark.parametrize(
    ("data", "old"),
    [
        ({}, False),
        ({"version": 1}, True),
        ({"version": 2, "pipeline": "gptq"}, False),
        ({"version": "1"}, False),
        ({"pipeline": "gptq"}, True),
        ({"rotation": None}, True),
        ({"weights": {"bits": 4}}, False),
        ({"weights": {"code": "affine"}}, True),
        ({"weights": ["code"]}, False),
        ({"activations": {"salient_over": "model"}}, True),
        ({"attention": {"key": {"salient_over": "layer"}}}, True),
        ({"attention": 3}, False),
        ({"overrides": [{"match": "model.layers.0.*", "skip": True}]}, False),
        ({"overrides": [{"match": "re:.*q", "skip": True}]}, False),
        ({"overrides": [{"match": ".*q", "skip": True}]}, True),
        ({"overrides": [{"match": "q", "weights": {"budget_over": "layer"}}]}, True),
        ({"overrides": [3]}, False),
    ],
)
def test_what_is_of_version_1(data: dict[str, Any], old: bool) -> None:
    assert is_old(data) is old


@pytest.mark.parametrize(
    ("preset", "old", "new"),
    [
        ("rtn-w4a4", ["pipeline=gptq"], ["algorithm=gptq"]),
        ("best-w4a4", ["pipeline=rtn"], ["algorithm=rtn"]),
        ("rtn-w4a4", ["gptq.rounds=6"], []),
        (
            "rtn-w4a4",
            ["gptq.damping=0.1", "pipeline=gptq"],
            ["algorithm={name: gptq, percdamp: 0.1}"],
        ),
        (
            "best-w4a4",
            ["gptq.damping=0.1", "gptq.compensation_damping=0.2"],
            ["algorithm.percdamp=0.1", "algorithm.compensation_percdamp=0.2"],
        ),
        (
            "best-w4a4",
            ["gptq={compensate: true}"],
            ["algorithm={name: gptq, compensate: true, compensation_percdamp: 0.03}"],
        ),
        ("spike-w4a4-t2", ["omniquant.epochs=2"], ["algorithm.epochs=2"]),
        ("omniquant-w4a4", ["omniquant={}"], []),
        (
            "gptq-w4a16",
            ["weights.code=ternary", "weights.bits=2", "weights.symmetric=true"],
            ["weights=ternary"],
        ),
        (
            "gptq-w4a16",
            ["weights={code: ternary, bits: 2, symmetric: true, budget: 2, budget_over: model}"],
            ["weights={format: ternary, budget: 2, allocation: model}"],
        ),
        ("ternary-1.4", ["weights.budget_over=layer"], ["weights.allocation=layer"]),
        (
            "gptq-w4a16",
            ["weights.code=partly-binary", "weights.salient_rate=0.1"],
            ["weights={format: partly-binary, salient_rate: 0.1}"],
        ),
        ("w4a4-t2", ["activations.salient_over=model"], ["activations.allocation=model"]),
        (
            "w4a4-t2",
            ["activations={bits: 8, salient_rate: 0.1, salient_over: model}"],
            ["activations={bits: 8, salient_rate: 0.1, allocation: model}"],
        ),
        ("quarot-w4a4", ["rotation.choose=loss"], ["transforms.online-rotation.choose=loss"]),
        (
            "quarot-w4a4",
            ["rotation.residual=false"],
            ["transforms=[value-output-rotation, online-rotation]"],
        ),
        (
            "rtn-w4a4",
            ["rotation={online: [output, down], equalize: true}"],
            ["transforms=[{name: equalization, sites: [value-output, up-down]}, online-rotation]"],
        ),
        (
            "rtn-w4a4",
            [
                "rotation.equalize=true",
                "rotation.online=[down]",
                "attention={key: {bits: 4}, value: {bits: 4}}",
            ],
            [
                "attention={key: {bits: 4}, value: {bits: 4}}",
                "transforms=[{name: equalization, sites: [query-key, up-down]}, {name:"
                " online-rotation, layers: [down]}]",
            ],
        ),
        (
            "rtn-w4a4",
            ["rotation={value_output: true, equalize: true}"],
            ["transforms=[{name: equalization, sites: [value-output]}, value-output-rotation]"],
        ),
        (
            "rtn-w4a4",
            [r"overrides=[{match: '.*\.(q|k)_proj', weights: {code: affine, bits: 3}}]"],
            [r"overrides=[{match: 're:.*\.(q|k)_proj', weights: {format: affine, bits: 3}}]"],
        ),
        (
            "ternary-1.4",
            [
                "overrides=[{match: '.*q', weights: {code: affine, budget: null, budget_over:"
                " layer}}]"
            ],
            ["overrides=[{match: 're:.*q', weights: {format: affine, bits: 2, symmetric: true}}]"],
        ),
        (
            "ternary-1.4",
            ["overrides=[{match: '.*q', weights: {bits: 2}}, {match: lm_head, skip: true}]"],
            ["overrides=[{match: lm_head, skip: true}]"],
        ),
    ],
)
def test_settings_in_words_of_version_1(preset: str, old: list[str], new: list[str]) -> None:
    require_apart(old)
    assert unnamed(load_recipe(preset, old)) == unnamed(load_recipe(preset, new))


def test_settings_say_their_new_words(notices: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe("best-w4a4", ["gptq.damping=0.1"])
    assert recipe.name == "best-w4a4 with gptq.damping=0.1"
    load_recipe("spike-w4a4-t2", ["omniquant.epochs=2"])
    assert notices.messages == [
        "spikellm: --set gptq.damping is of version 1; version 2 calls it algorithm.percdamp"
    ]


@pytest.mark.parametrize(
    ("preset", "settings", "message"),
    [
        ("rtn-w4a4", ["gptq.damping=0.1"], "the section gptq has no effect on algorithm 'rtn'"),
        (
            "gptq-w4a16",
            ["omniquant.epochs=3"],
            "no effect on algorithm 'gptq'; set algorithm to omni",
        ),
        ("gptq-w4a16", ["gptq=3"], "gptq: expected keys and values, found 3"),
        ("gptq-w4a16", ["gptq.dampin=0.1"], "unknown key 'algorithm.dampin'"),
        ("rtn-w4a4", ["rotation.residual=1"], "rotation.residual: expected true or false, found 1"),
        ("rtn-w4a4", ["rotation.online=[up]"], r"transforms\.0\.layers\.0: .*'output' or 'down'"),
        ("rtn-w4a4", ["rotation.online=[down, down]"], "layers names a layer twice"),
        ("rtn-w4a4", ["rotation.choose=loss"], "layers names no layer"),
        ("rtn-w4a4", ["rotation.equalize=true"], "sites names no site"),
        (
            "rtn-w4a4",
            ["rotation.turn=true"],
            "unknown key 'rotation.turn'.*valid: rotation.residual",
        ),
        ("rtn-w4a4", ["rotation=3"], "rotation: expected keys and values"),
        ("rtn-w4a4", ["rotation.residual=true", "transforms=[]"], "set the same field"),
        ("rtn-w4a4", ["weights={code: ternary, format: affine}"], "code and format name the same"),
        ("rtn-w4a4", ["pipeline=magic"], "unknown algorithm 'magic'"),
    ],
)
def test_what_version_1_refused_is_refused(preset: str, settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(preset, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["gptq.damping=0.1", "algorithm.percdamp=0.2"],
        ["pipeline=gptq", "algorithm=rtn"],
        ["weights.code=ternary", "weights.format=affine"],
        ["weights={budget_over: model}", "weights.allocation=layer"],
        ["attention.key.salient_over=layer", "attention.key.allocation=layer"],
    ],
)
def test_the_same_field_in_words_of_both_versions(settings: list[str]) -> None:
    with pytest.raises(RequestError, match="set the same field"):
        require_apart(settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"version": 1, "algorithm": "gptq"},
            "algorithm is of version 2, and the recipe of version 1",
        ),
        ({"pipeline": "rtn", "gptq": {"compensate": True}}, "has no effect on algorithm 'rtn'"),
        ({"pipeline": "gptq", "gptq": 3}, "expected keys and values, found 3"),
        ({"pipeline": ["gptq"]}, "unknown algorithm"),
        ({"version": 1, "weights": {"code": "ternary", "bits": 4}}, "unknown key 'weights.bits'"),
        (
            {"version": 1, "weights": {"budget": 1.4}},
            "unknown key 'weights.budget'.* of 'bcq' and 'ternary'",
        ),
        ({"version": 1, "weights": 3}, "weights: Input should be"),
        ({"version": 1, "rotation": 3}, "rotation: expected keys and values"),
        ({"version": 1, "overrides": 3}, "overrides: "),
        ({"version": 1, "nonsense": 3}, "unknown key 'nonsense'"),
    ],
)
def test_data_of_version_1_that_makes_no_sense(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_from(data, "it")
    assert str(caught.value).startswith("it: ")


def test_migrating_changes_nothing_that_was_given() -> None:
    weights = {"code": "ternary", "bits": 2, "symmetric": True}
    data = {"pipeline": "gptq", "weights": weights, "overrides": [{"match": ".*", "skip": True}]}
    assert migrated(data)["weights"] == {"format": "ternary"}
    assert len(weights) == 3
    assert data["overrides"] == [{"match": ".*", "skip": True}]
