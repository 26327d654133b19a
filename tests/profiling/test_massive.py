from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.profiling import page
from spikellm.profiling.massive import ExtraSteps, extra_steps, most_massive
from spikellm.profiling.report import Report

SETTINGS = [
    "activations.token_steps=8",
    "activations.token_factor=1.2",
    "activations.token_rate=0.1",
    "attention={query: {bits: 4}, key: {bits: 4, token_steps: 6, token_factor: 1.2}, value:"
    " {bits: 4}}",
]


@pytest.fixture(scope="module")
def massive(text_file: Path) -> tuple[Any, Report]:
    model, tokenizer = first_blocks(2)
    text = str(text_file)
    spikellm.convert(model, tokenizer, "rtn-w4a4", text, samples=2, seqlen=64, settings=SETTINGS)
    return model, spikellm.report(model, tokenizer, text, tokens=128, seqlen=32)


def test_tokens_with_extra_steps_are_those_of_the_trains(
    massive: tuple[Any, Report], tokens: torch.Tensor
) -> None:
    model, _ = massive
    trains: list[SpikeTrain] = []
    with torch.no_grad(), observe_spikes(trains.append):
        model(tokens, use_cache=False)
    found = extra_steps(model, tokens)
    assert found
    layers = dict(model.named_modules())
    for name, extra in found.items():
        part = name.rpartition(".")[2]
        if part == "key":
            source = layers[name.removesuffix(".key") + ".spikes"]
            (train,) = (one for one in trains if one.source is source and one.part == "key")
            steps = train.steps.expand(train.shown.shape).amax((1, 3))
            assert extra.steps == 6
            assert extra.calibrated is None
        else:
            (train,) = (one for one in trains if one.source is layers[name])
            steps = train.steps.expand(train.shown.shape).amax(-1).view(tokens.shape)
            assert extra.steps == 8
            assert 0 < (extra.calibrated or 0) <= 0.1
        assert extra.tokens == tokens.numel()
        assert torch.equal(extra.found, (steps == extra.steps).nonzero())


def test_report_shows_them(massive: tuple[Any, Report]) -> None:
    _, report = massive
    text = page.render(report)
    assert '<figure id="massive">' in text
    assert "Tokens with extra steps" in text
    data = report.to_data()["extra_steps"]
    assert data.keys() == report.extra.keys()
    assert sum(own["with_extra_steps"] for own in data.values()) > 0
    first = report.massive[0]
    assert first.inputs == max(token.inputs for token in report.massive)
    assert first.text
    assert f"{first.inputs} of {len(report.extra)}" in text
    assert "tokens with extra steps" in text, "in the panel of a layer"


def test_nothing_where_no_token_is_told_apart(text_file: Path) -> None:
    model, tokenizer = first_blocks(1)
    spikellm.convert(model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=64)
    assert extra_steps(model, torch.zeros(1, 8, dtype=torch.long)) == {}
    report = spikellm.report(model, tokenizer, str(text_file), tokens=64, seqlen=64)
    assert report.massive == ()
    assert "Tokens with extra steps" not in page.render(report)


def test_ranking() -> None:
    found = {
        "a": ExtraSteps(8, 0.1, 20, torch.tensor([[0, 0], [1, 3]])),
        "b": ExtraSteps(8, 0.1, 20, torch.tensor([[1, 3], [-1, 5]])),
    }
    ranked = most_massive(found, 5)
    assert [(token.window, token.position, token.inputs) for token in ranked] == [
        (1, 3, 2),
        (0, 0, 1),
    ], "experts see some tokens alone, whose place is not known"
    assert found["a"].share == 0.1
    assert found["a"].first == 1
