"""``train`` and ``recoding`` at the top of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikellm.core.errors import RecipeError
from spikellm.recipe import Recipe, recipe_from
from spikellm.recipe.load import load_recipe, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_all_presets_but_the_published_ones_are_centered(name: str) -> None:
    recipe = load_recipe(name)
    heads = recipe.attention
    parts = [recipe.activations, heads.query, heads.key, heads.value, heads.probabilities]
    expected = "published" if name.startswith("reference-") else "centered"
    assert {part.train for part in parts if part.spiking} <= {expected}
    assert {part.train for part in parts if not part.spiking} <= {"published"}


def test_what_does_not_say_is_published_and_keeps_its_bytes() -> None:
    recipe = recipe_from({"activations": {"bits": 4}, "attention": {"query": {"bits": 4}}}, "here")
    assert recipe.activations.train == recipe.attention.query.train == "published"
    assert "train" not in recipe.to_yaml()
    assert "recoding" not in recipe.to_yaml()


def test_sections_say_it_and_win_and_a_setting_is_of_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "train: centered\nactivations: {bits: 8, train: published}\n"
        "attention: {query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.activations.train, recipe.attention.key.train) == ("published", "centered")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    printed = tmp_path / "printed.yaml"
    printed.write_text(recipe.to_yaml())
    for source in (path, printed, recipe):
        changed = load_recipe(source, ["train=centered", "recoding=signed-digit"])
        assert changed.activations.train == changed.attention.key.train == "centered"
        assert changed.activations.recoding == changed.attention.key.recoding == "signed-digit"
        assert changed.attention.probabilities.recoding == "binary", "it is not coded"
        back = load_recipe(changed, ["train=published"])
        assert back.activations.train == back.attention.value.train == "published"
    left = load_recipe("w4a4-t2", ["activations={bits: 16}"])
    assert left.activations.train == "published", "nothing is coded, and nothing is refused"
    weights_alone = load_recipe("gptq-w4a16", ["activations={bits: 4}"])
    assert weights_alone.activations.train == "centered"
    override = load_recipe("w4a4-t2", ["overrides=[{match: down_proj, activations: {bits: 8}}]"])
    settings = override.for_module("model.layers.0.mlp.down_proj")
    assert settings is not None
    assert settings.activations.train == "centered"


@pytest.mark.parametrize(
    "setting", ["train=signed", "recoding=unary", "activations.train=3", "train={}"]
)
def test_others_are_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match="Input should be"):
        load_recipe("w4a4-t2", [setting])
