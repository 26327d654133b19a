"""What ``inspect`` says of a model."""

from __future__ import annotations

from typing import Literal

import pytest

from spikellm.commands.inspect import transforms_in_words
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
