"""What is decided over the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from spikellm.conversion import allocate
from spikellm.conversion.survey import SurveyedBlock
from spikellm.recipe.load import load_recipe


def test_the_survey_ends_with_the_error_of_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when the error is forgotten: a block is on the device until then."""
    ended = []

    def survey(*_: object, **__: object) -> Iterator[SurveyedBlock]:
        layer: Any = "layer"
        try:
            yield SurveyedBlock([layer], [])
        finally:
            ended.append(True)

    def fail(layers: Iterator[Any], _: object) -> None:
        next(layers)
        raise ValueError("no")

    monkeypatch.setattr(allocate, "survey", survey)
    for shares in (allocate.StepShares, allocate.SpikeShares):
        monkeypatch.setattr(shares, "look", lambda *_: None)
    recipe = load_recipe("ternary-1.4")
    context: Any = SimpleNamespace(
        surveyed=True,
        recipe=recipe,
        algorithm=SimpleNamespace(survey=fail),
        algorithm_looks_at=lambda _: True,
        plan=[SimpleNamespace(linears={"layer": recipe.for_module("layer")})],
    )
    with pytest.raises(ValueError, match="no") as error:
        allocate.allocate_over_model(context)
    assert ended, error
