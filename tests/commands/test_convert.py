"""Two conversions to one folder do not meet."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import spikellm
from conftest import BUNDLED
from interruptions import bytes_of, convert, ended, forked
from spikellm.__main__ import main
from spikellm.commands.support import progress as told
from spikellm.commands.support.conversion import locked_for_all
from spikellm.core import distributed
from spikellm.core.errors import RequestError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def waiting(out: Path, text: Path, go: Path) -> int:
    """A conversion in another process that waits after its second block until a file is there."""

    def work() -> None:
        def on_block(progress: Any) -> None:
            until = time.monotonic() + 60
            while progress.index == 1 and not go.exists() and time.monotonic() < until:
                (out.parent / "waits").touch()
                time.sleep(0.01)

        told.report_block = lambda: on_block
        convert(BUNDLED, out, text)

    child = forked(work)
    while not (out.parent / "waits").exists():
        time.sleep(0.01)
    return child


@pytest.mark.parametrize("extra", [[], ["--force"], ["--resume"]])
def test_the_second_one_is_refused_and_nothing_is_lost(
    extra: list[str], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, go = tmp_path / "out", tmp_path / "go"
    child = waiting(out, text_file, go)
    before = bytes_of(tmp_path)
    small = ["--calibration", str(text_file), "--samples", "2", "--seqlen", "32"]
    assert main(["convert", str(BUNDLED), str(out), *small, *extra]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"out is being written by process {child} on " in error
    assert bytes_of(tmp_path) == before
    go.touch()
    assert ended(child) == 0
    spikellm.load(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go", "out", "waits"]


def test_one_that_was_killed_holds_nobody_up(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = waiting(out, text_file, tmp_path / "go")
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    convert(BUNDLED, out, text_file, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "waits"]


def test_the_first_rank_takes_the_lock_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0.0
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "sum_scalar", lambda number: number + refused)
    with locked_for_all(tmp_path / "out"):
        assert not list(tmp_path.iterdir())
    refused = 1.0
    with pytest.raises(RequestError, match="as rank 0 says"), locked_for_all(tmp_path / "out"):
        pytest.fail("entered")
