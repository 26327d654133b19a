"""The verb ``train``: a folder, killed and resumed, and refusals in one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import spikellm
from conftest import BUNDLED
from interruptions import bytes_of, ended, forked
from spikellm.__main__ import main
from spikellm.commands.support import progress
from spikellm.training import run

SMALL = ("seqlen=32", "batch=2", "held_out=0", "check_every=2")
OPTIONS = [word for one in SMALL for word in ("--set", f"training.{one}")]


def arguments(folder: Path, out: Path, text: Path, *more: str) -> list[str]:
    given = ["--original", str(BUNDLED), "--calibration", str(text), "--steps", "4"]
    return ["train", str(folder), str(out), *given, *OPTIONS, *more]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_resumed_it_ends_in_the_same_bytes(
    converted_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_WRITES", 0.0)
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    whole.parent.mkdir()
    assert main(arguments(converted_folder, whole, text_file)) == 0
    seen = capsys.readouterr()
    assert "numbers trained in 4 updates; state of update 4 kept" in seen.out.replace("\n", " ")
    assert "update 3/4" in seen.err

    def work() -> None:
        def on_step(at: Any) -> None:
            if at.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(progress, "report_step", lambda: on_step)
        main(arguments(converted_folder, out, text_file))

    assert ended(forked(work)) == -signal.SIGKILL
    assert not out.exists()
    assert main(arguments(converted_folder, out, text_file)) == 2
    assert "holds an interrupted training; go on with --resume" in capsys.readouterr().err
    assert main(arguments(converted_folder, out, text_file, "--resume")) == 0
    assert bytes_of(out) == bytes_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    capsys.readouterr()
    assert main(arguments(converted_folder, out, text_file, "--resume")) == 0
    seen = capsys.readouterr()
    assert "is finished already" in seen.err
    assert "20,137 numbers trained in 4 updates" in seen.out.replace("\n", " ")
    more = ("--resume", "--set", "training.clip=2")
    assert main(arguments(converted_folder, out, text_file, *more)) == 2
    model, _ = spikellm.load(out)
    assert model.config.quantization_config.record["training"]["best"] == 4


def test_original_that_nobody_names_is_asked_for(
    converted_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(converted_folder), str(tmp_path / "out"), "--calibration", str(text_file)]
    assert main(["train", *given, *OPTIONS]) == 2
    assert "give what it was converted from (--original" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_conversion_that_is_killed_while_it_trains_ends_in_the_same_bytes(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_WRITES", 0.0)
    small = ["--samples", "2", "--seqlen", "32", "--calibration", str(text_file)]
    options = [*OPTIONS, "--set", "training.steps=3", *small]
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    whole.parent.mkdir()
    assert main(["convert", str(BUNDLED), str(whole), *options]) == 0

    def work() -> None:
        def on_step(at: Any) -> None:
            if at.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(progress, "report_step", lambda: on_step)
        main(["convert", str(BUNDLED), str(out), *options])

    assert ended(forked(work)) == -signal.SIGKILL
    assert main(["convert", str(BUNDLED), str(out), *options, "--resume"]) == 0
    assert bytes_of(out) == bytes_of(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--set", "training.rate=0"), "training.rate"),
        (("--set", "training.speed=1"), "unknown key"),
        (("--set", "training.name=fast"), "unknown training stage 'fast'"),
        (("--resume", "--force"), "give one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(
    more: tuple[str, ...],
    said: str,
    converted_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(converted_folder, tmp_path / "out", text_file, *more)) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_converted_is_refused(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["train", str(BUNDLED), str(tmp_path / "out"), "--calibration", str(text_file)]) == 2
    )
    assert "was not converted; convert it first" in capsys.readouterr().err
