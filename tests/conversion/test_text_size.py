"""Too little calibration text is said: in a warning, in the record and in the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.checkpoint.save import spike_config
from spikellm.conversion.text_size import different_share
from spikellm.core import warn


@pytest.fixture
def warnings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """Warnings of a process that has given none yet."""
    monkeypatch.setattr(warn, "_said", set())
    return caplog


def converted(text: Path, samples: int, recipe: str = "gptq-w4a16", seqlen: int = 64) -> Any:
    model, tokenizer = first_blocks(1)
    spikellm.convert(model, tokenizer, recipe, str(text), samples=samples, seqlen=seqlen)
    return model, tokenizer


def noted(model: Any) -> list[str]:
    config = spike_config(model)
    assert config is not None
    found: list[str] = config.record["calibration"]["notes"]
    return found


def test_it_is_said_everywhere(
    text_file: Path, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = converted(text_file, 2)
    [note] = noted(model)
    assert warnings.messages == [f"spikellm: {note}"]
    widest = max(layer.in_features for layer in spikellm.summarize(model).layers)
    assert f"128 tokens for {widest} input channels of model.layers.0.mlp.down_proj" in note
    assert "7 of 7 layers see fewer than 4 a channel" in note
    assert f"take --samples {4 * widest // 64} or more" in note
    card = (spikellm.save(model, tokenizer, tmp_path / "out") / "README.md").read_text("utf-8")
    assert f"2 windows of 64 tokens\n- {note}\n" in card


def test_what_it_says_would_do_does(text_file: Path, warnings: pytest.LogCaptureFixture) -> None:
    model, _ = converted(text_file, 2)
    samples = int(noted(model)[0].partition("--samples ")[2].split()[0])
    warnings.clear()
    enough, _ = converted(text_file, 2 * samples)  # windows at random places overlap a little
    assert noted(enough) == warnings.messages == []


def test_round_to_nearest_needs_none(text_file: Path, warnings: pytest.LogCaptureFixture) -> None:
    model, _ = converted(text_file, 1, "w4a4-t2")
    assert noted(model) == warnings.messages == []


def test_windows_of_a_short_text_are_the_same_text(
    text_file: Path, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    model, _ = converted(short, 64)
    assert "give a longer text" in noted(model)[0]


def test_share_of_different_tokens() -> None:
    assert different_share(torch.arange(256).view(4, 64)) == 1
    assert different_share(torch.arange(64).expand(4, 64)) == 0.25
    assert different_share(torch.arange(8).view(4, 2)) == 1
