from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from spikellm.core.errors import RecipeError
from spikellm.neurons import make_neuron, neurons
from spikellm.recipe import Recipe, recipe_from
from spikellm.recipe.load import load_recipe, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_presets_of_the_contract_exist() -> None:
    assert {
        "rtn-w4a4",
        "w4a4-t2",
        "w4a4-t4",
        "w2a8-t2",
        "w8a8",
        "w4a16",
        "reference-w4a4-t2",
        "reference-w4a4-t4",
    } <= set(preset_names())


def test_reference_presets_follow_the_paper() -> None:
    for steps, rate in ((2, 0.10), (4, 0.05)):
        activations = load_recipe(f"reference-w4a4-t{steps}").activations
        assert (
            activations.saliency,
            activations.thresholds,
            activations.salient_rate,
            activations.salient_steps,
        ) == (
            "first-order",
            "shared",
            rate,
            steps,
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("weights.bits=9", "less than or equal to 8"),
        ("weights.bits=1", "greater than or equal to 2"),
        ("weights.bit=3", "did you mean 'weights.bits'"),
        ("weight.bits=3", "unknown key 'weight', did you mean 'weights'"),
        ("activations.bits=0", "expected 1 to 8, or 16"),
        ("activations.bits=16", "would have no effect"),
        ("activations.neuron=lif", f"valid: {', '.join(neurons.names())}"),
        ("activations.neuron=ternary", "2 bits"),
        ("activations.saliency=hessian", "valid: "),
        ("activations.salient_rate=1.5", "less than 1"),
        ("activations.salient_rate=0", "would have no effect while salient_rate is 0"),
        ("activations.salient_steps=300", "less than or equal to 255"),
        ("activations.invert=true", "cannot be inverted"),
        ("activations.bits=8", None),
        ("seed=-1", "greater than or equal to 0"),
        ("version=3", "Input should be 2"),
        ("nonsense", "expected key=value"),
        ("weights.bits.x=3", "no section"),
        ("weights=[", "not a YAML value"),
        ("overrides=[{match: 're:(', skip: true}]", "not a regular expression"),
        ("overrides=[{match: x}]", "must either skip or set"),
        ("overrides=[{match: x, weights: {bits: 11}}]", "less than or equal to 8"),
    ],
)
def test_settings_are_checked(setting: str, message: str | None) -> None:
    if message is None:
        assert load_recipe("w4a4-t2", [setting]) != load_recipe("w4a4-t2")
        return
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("w4a4-t2", [setting])
    assert "\n" not in str(caught.value)


def test_shared_thresholds_with_equal_steps_are_refused() -> None:
    with pytest.raises(RecipeError, match="coded like all others"):
        load_recipe("reference-w4a4-t2", ["activations.salient_steps=1", "activations.neuron=gif"])


@pytest.mark.parametrize(
    ("preset", "setting", "message"),
    [
        ("rtn-w4a4", "activations.saliency=bogus", "unknown saliency"),
        ("w4a16", "activations.neuron=bogus", "unknown neuron"),
        ("rtn-w4a4", "activations.thresholds=shared", "thresholds would have no effect"),
        ("rtn-w4a4", "activations.saliency=rms", "saliency would have no effect"),
        ("w4a16", "activations.thresholds=shared", "thresholds would have no effect"),
        ("w4a16", "activations.symmetric=true", "symmetric would have no effect"),
        ("w4a4-t2", "activations.bits=true", "valid integer"),
        (
            "gptq-w4a16",
            "algorithm.rounds=1",
            "algorithm.rounds would have no effect on weights of format 'affine', only on"
            " 'bcq' or 'ternary'",
        ),
        ("pbllm-90", "algorithm.rounds=1", "of format 'partly-binary', only on 'bcq' or 'ternary'"),
        ("pbllm-90", "algorithm.descents=1", "only on 'affine' or 'bcq' or 'ternary'"),
        (
            "ternary-1.4",
            "algorithm.search_range=true",
            "algorithm.search_range would have no effect on weights of format 'ternary', only on"
            " 'affine'",
        ),
        ("gptq-w4a16", "algorithm={name: gptq, rounds: 1, search_range: true}", "m.rounds"),
    ],
)
def test_what_would_have_no_effect_is_refused(preset: str, setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(preset, [setting])


def test_partly_binary_weights_take_no_spikes() -> None:
    weights = "{format: partly-binary, bits: 8, salient_rate: 0.1}"
    reason = r"partly-binary take inputs as they are .*; set activations\.bits to 16, not 4$"
    with pytest.raises(RecipeError, match=reason) as caught:
        load_recipe("rtn-w4a4", ["algorithm=gptq", f"weights={weights}"])
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=reason):
        load_recipe("pbllm-90", ["overrides=[{match: '*q', activations: {bits: 4}}]"])
    with pytest.raises(RecipeError, match=reason):
        load_recipe(
            "rtn-w4a4", ["algorithm=gptq", f"overrides=[{{match: '*q', weights: {weights}}}]"]
        )
    mixed = f"overrides=[{{match: '*q', weights: {weights}, activations: {{bits: 16}}}}]"
    assert load_recipe("rtn-w4a4", ["algorithm=gptq", mixed]).for_module("q") is not None


def test_overrides_bring_codes_that_have_an_effect() -> None:
    rounds = "algorithm.rounds=1"
    ternary = "overrides=[{match: '*q', weights: ternary}]"
    assert load_recipe("gptq-w4a16", [rounds, ternary]).for_module("q").weights.format == "ternary"
    with pytest.raises(RecipeError, match=r"algorithm\.rounds would have no effect"):
        load_recipe("gptq-w4a16", [rounds, "overrides=[{match: '*q', weights: {bits: 3}}]"])
    affine = "overrides=[{match: '*q', weights: {format: affine, bits: 4}}]"
    recipe = load_recipe("ternary-1.4", ["algorithm.search_range=true", affine])
    assert recipe.for_module("q").weights.budget is None


def test_overrides_that_only_clash_together() -> None:
    recipe = load_recipe(
        "rtn-w4a4",
        [
            "overrides=[{match: '*', activations: {bits: 16}}, {match: '*q', activations: {steps:"
            " 2}}]"
        ],
    )
    assert recipe.for_module("k") is not None
    with pytest.raises(
        RecipeError, match=r"override '\*q': activations: steps would have no effect"
    ):
        recipe.for_module("q")


def test_codes_stay_in_range() -> None:
    with pytest.raises(RecipeError, match="at most 4095"):
        load_recipe("w4a4-t2", ["activations.bits=8", "activations.salient_steps=17"])
    assert make_neuron("gif", 8).top(16) == 4080


def test_overrides_are_merged_in_order_and_matched_whole() -> None:
    recipe = load_recipe(
        "w4a4-t2",
        [
            "overrides=[{match: '*down', weights: {bits: 8}}, {match: 'b.*', skip: true}, {match:"
            " '*down', activations: {salient_steps: 4}}]"
        ],
    )
    plain, down, skipped = (
        recipe.for_module("x.up"),
        recipe.for_module("x.down"),
        recipe.for_module("b.up"),
    )
    assert plain is not None
    assert down is not None
    assert (plain.weights.bits, plain.activations.salient_steps) == (4, 2)
    assert (down.weights.bits, down.activations.salient_steps) == (8, 4)
    assert skipped is None
    assert recipe.for_module("x.down.more") == plain
    assert recipe.unmatched_overrides(["x.down"]) == ["b.*"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("algorithm.let_rate=.inf", "finite number"),
        ("algorithm.lwc_rate=.nan", "finite number"),
        ("weights.salient_rate=.nan", "finite number"),
        ("calibration.opening_weight=true", "a number is expected"),
        ("activations.spikes=true", "a number is expected"),
        ("calibration.samples=1000001", "less than or equal to 1000000"),
        ("calibration.seqlen=10000001", "less than or equal to 10000000"),
        ("calibration.saliency_tokens=1000000000", "less than or equal to 100000000"),
        ("algorithm.batch_size=10000000", "less than or equal to 1000000"),
        ("algorithm.accumulate=10000000", "less than or equal to 1000000"),
        ("algorithm.epochs=1000000", "less than or equal to 100000"),
        ("algorithm={name: gptq, rounds: 10000000}", "less than or equal to 1000000"),
        ('name="a\\eb"', r"name: holds '\\x1b', which means something to a terminal"),
        ('name="a\\nb"', r"name: holds '\\n', which means something to a terminal"),
        ('name="a\\ud800"', "name: holds half a character"),
        ('calibration.text="a\\udc80.txt"', r"calibration\.text: holds half a character"),
        (
            "overrides=[{match: '*', skip: true}, {match: \"a\\ud800\", skip: true}]",
            r"overrides\.1\.match: holds half a character",
        ),
        (
            'description="a\\e[2J"',
            r"description: holds '\\x1b', which means something to a terminal",
        ),
    ],
)
def test_what_no_machine_bears_is_refused(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("omniquant-w4a4", [setting])
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_names_and_descriptions() -> None:
    assert load_recipe(
        "w4a4-t2", ['description="two\\nlines, é, \\u3000, 👩‍🚀"']
    ).description.startswith("two\nlines")
    assert (
        load_recipe("w4a4-t2", ["weights={bits: 3,\n  group_size: 32}"]).name
        == "w4a4-t2 with weights={bits: 3, group_size: 32}"
    )
    with pytest.raises(RecipeError, match="name: holds half a character"):
        recipe_from({"name": "a\ud800"}, "recipe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "holds list"),
        ("a: [", "cannot be read as YAML"),
        ("weigths: {bits: 4}", "did you mean 'weights'"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_unknown_names_and_missing_files() -> None:
    with pytest.raises(RecipeError, match="did you mean 'w4a4-t2'"):
        load_recipe("w4a4t2")
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe("nowhere/mine.yaml")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []", encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be read as YAML"):
        load_recipe(path)
    assert yaml.safe_load("1") == 1
