from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from conftest import PROJECT
from spikellm import api
from spikellm.core.errors import RequestError
from spikellm.recipe.settings import require_apart


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        (["weights.bits=3", "activations.bits=4"], []),
        (["weights={bits: 3}", "weights.group_size=32"], []),
        (
            [
                "attention={key: {bits: 4}, value: {bits: 4}}",
                "attention.key.steps=2",
                "attention.rotate=true",
            ],
            [],
        ),
        (["calibration={text: stdlib}"], ["calibration.samples"]),
    ],
)
def test_fields_that_are_set_once(settings: list[str], given: list[str]) -> None:
    require_apart(settings, given)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        (["weights.bits=3", "weights.bits=4"], []),
        (["weights.bits=3", "weights={group_size: 32}"], []),
        (["weights={bits: 3}", "weights.bits=4"], []),
        (["attention={key: {bits: 4}}", "attention.key={bits: 3}"], []),
        (["attention.key.bits=4", "attention={value: {bits: 4}}"], []),
        (["seed=3"], ["seed"]),
        (["calibration={samples: 8}"], ["calibration.samples"]),
    ],
)
def test_fields_that_are_set_twice(settings: list[str], given: list[str]) -> None:
    with pytest.raises(RequestError, match="set the same field"):
        require_apart(settings, given)


def test_the_recipes_of_the_benchmark_of_accuracy() -> None:
    spec = importlib.util.spec_from_file_location(
        "accuracy", PROJECT / "benchmarks" / "accuracy.py"
    )
    assert spec is not None
    assert spec.loader is not None
    accuracy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accuracy)
    for preset, always, rows in accuracy.TABLES.values():
        names = {
            api.resolve_recipe(preset, settings=(*always, *settings)).name
            for settings in rows.values()
        }
        assert len(names) == len(rows)


def test_settings_are_a_list_and_a_text_may_be_a_path() -> None:
    with pytest.raises(RequestError, match="expected a list of key=value"):
        api.resolve_recipe("w4a4-t2", settings="weights.bits=3")
    assert api.resolve_recipe("w4a4-t2", Path("a/text.txt")).calibration.text == str(
        Path("a/text.txt")
    )
