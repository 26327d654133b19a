"""Standard output and standard error that are full, closed, left by their reader, or of few
characters; and what the environment says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.core import distributed, streams
from spikellm.core.console import write_json
from spikellm.core.errors import RequestError

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def shell(line: str, **surroundings: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which ``s`` is the program."""
    program = f'set -o pipefail; s() {{ "{sys.executable}" -m spikellm "$@"; }}; {line}'
    return subprocess.run(
        ["/bin/bash", "-c", program],
        env={**os.environ, **surroundings},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        pytest.param(
            "s recipes > /dev/full",
            1,
            "cannot write to standard output: No space left",
            marks=needs_full,
        ),
        pytest.param(
            "PYTHONIOENCODING=ascii s recipes w8a8 > /dev/full",
            1,
            "cannot write to standard output",
            marks=[needs_full, pytest.mark.slow],
        ),
        pytest.param(
            "s recipes --json - > /dev/full",
            1,
            "cannot write to standard output: No space left",
            marks=[needs_full, pytest.mark.slow],
        ),
        pytest.param(
            "s recipes --json /dev/full > /dev/null",
            1,
            "cannot write /dev/full: No space left",
            marks=needs_full,
        ),
        pytest.param("s recipes nope 2> /dev/full", 2, "", marks=[needs_full, pytest.mark.slow]),
        ("s recipes >&-", 1, "standard output is closed"),
        pytest.param("s recipes nope 2>&-", 2, "", marks=pytest.mark.slow),
        ("s recipes | true", 0, ""),
        pytest.param("s recipes --json - | true", 0, "", marks=pytest.mark.slow),
        pytest.param("s --debug recipes nope 2>&1 | tail -1", 2, "", marks=pytest.mark.slow),
        ("PYTHONIOENCODING=ascii s recipes w8a8", 0, ""),
        ("WORLD_SIZE=x RANK=0 s recipes nope", 2, "error (rank 0): unknown recipe"),
    ],
)
def test_one_line_and_the_status(line: str, status: int, words: str) -> None:
    done = shell(line)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == (1 if words else 0), done.stderr
    assert words in done.stderr


def test_debugging_keeps_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "recipes", "nope"], ["--debug", "recipes", "--nope"]):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("Traceback")
        assert told.splitlines()[-1].startswith("spikellm: error:")


def test_what_an_output_cannot_encode_is_escaped(tmp_path: Path) -> None:
    done = shell(f"PYTHONIOENCODING=ascii s generate '{BUNDLED}' é --max-new-tokens 1 --json -")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "é"
    write_json({"half": "\udcff", "whole": "é"}, str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        "half": "\udcff",
        "whole": "é",
    }
    assert streams.encodes("é")
    assert not streams.encodes("é", "ascii")


def test_a_prompt_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(BUNDLED), "\udcff abc"]) == 2
    assert r"prompt '\udcff abc' holds bytes that are no UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("surroundings", "words"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', expected a whole number from 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', expected a whole number from 1"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, expected a whole number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2', expected a whole number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"},
            "MASTER_PORT is 'abc', expected a whole number",
        ),
    ],
)
def test_ranks_that_nothing_started(
    surroundings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=words), distributed.process_group():
        pytest.fail("joined")
