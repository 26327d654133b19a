"""What ``inspect`` says of a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pytest

import spikellm
from conftest import first_blocks
from spikellm.commands.inspect import trains_in_words, transforms_in_words
from spikellm.models.train_summary import summarize_trains
from spikellm.recipe.base import TransformOptions
from spikellm.recipe.load import load_recipe
from spikellm.transforms import Transform, transforms


class NudgeOptions(TransformOptions):
    name: Literal["nudge"] = "nudge"


class Nudge(Transform[NudgeOptions]):
    Options = NudgeOptions


def test_every_transform_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own words, or by its name."""
    monkeypatch.setitem(TransformOptions.registry._entries, "nudge", NudgeOptions)
    monkeypatch.setitem(transforms._entries, "nudge", Nudge)
    chosen = (
        "transforms=[{name: residual-rotation}, {name: equalization, sites: [up-down]},"
        " {name: value-output-rotation}, {name: online-rotation, layers: [down]}, {name: nudge}]"
    )
    recipe = load_recipe("best-w4a4", [chosen]).model_dump(mode="json")
    assert transforms_in_words(recipe) == (
        "the residual stream rotated (fused), channels of up-down equalized (fused), heads of V"
        " rotated (fused), inputs of down layers rotated, nudge, Q and K rotated"
    )
    assert not transforms_in_words(load_recipe("w4a4-t2").model_dump(mode="json"))


def test_trains_are_told_in_one_place(text_file: Path) -> None:
    """Each form once, with what fires it."""
    model, tokenizer = first_blocks()
    assert not summarize_trains(model)
    settings = (
        "attention={query: {bits: 4, train: centered}, key: {bits: 4, train: centered,"
        " recoding: signed-digit}, value: {bits: 4, train: published}}",
    )
    spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=32, settings=settings
    )
    blocks = model.config.num_hidden_layers
    found = summarize_trains(model)
    assert [(one.train, one.recoding, one.populations) for one in found] == [
        ("centered", "binary", 7 * blocks + blocks),
        ("centered", "signed-digit", blocks),
        ("published", "binary", blocks),
    ]
    assert found[0].parts == ("inputs of linear layers", "query")
    assert trains_in_words([asdict(one) for one in found[:2]]) == (
        "trains about the baseline (nothing fires at rest), bits in phase execution: inputs of"
        " linear layers, query; about the baseline (nothing fires at rest), signed digits in phase"
        " execution: key"
    )
    published = [{"train": "published", "recoding": "binary", "parts": ["query"]}]
    assert "of whole codes, as published" in trains_in_words(published)
