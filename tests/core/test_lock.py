"""A folder is written by one process at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spikellm.core import lock
from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.core.lock import locked

_HOLD = """
import sys
from pathlib import Path
from spikellm.core.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(target: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its standard input ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_the_second_says_who_holds_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = holding(out)
    words = f"is being written by process {child.pid} on {socket.gethostname()} since 2"
    with pytest.raises(RequestError, match=words), locked(out):
        pytest.fail("entered")
    with locked(tmp_path / "other"):
        pass
    child.communicate()
    assert not list(tmp_path.iterdir())
    with locked(out):
        assert json.loads((tmp_path / ".out.holder").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_it_dies_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = holding(out)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.holder", ".out.lock"]
    with locked(out):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its former holder removes the file between our opening and our locking it."""
    path, opened = tmp_path / ".out.lock", []
    real = os.open

    def swapped(*arguments: object) -> int:
        descriptor = real(*arguments)  # type: ignore[arg-type]
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
            path.touch()
        return descriptor

    monkeypatch.setattr(lock.os, "open", swapped)
    with locked(tmp_path / "out"):
        monkeypatch.undo()
        with pytest.raises(RequestError, match="being written"), locked(tmp_path / "out"):
            pytest.fail("entered")


def test_folders_above_are_there_meanwhile(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_folders_above_may_vanish_before_they_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, done with the same folder, removes what it made."""
    (tmp_path / "a").mkdir()
    real, seen = Path.exists, []

    def vanishing(path: Path, **keywords: bool) -> bool:
        there = real(path, **keywords)
        if path == tmp_path / "a" and not seen:
            seen.append(path)
            path.rmdir()
        return there

    monkeypatch.setattr(Path, "exists", vanishing)
    with locked(tmp_path / "a" / "out"):
        assert seen
    assert not list(tmp_path.iterdir())


def test_folders_above_may_vanish_before_the_lock_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.open, []

    def vanishing(path: Path, *arguments: int) -> int:
        if not seen:
            seen.append(path)
            (tmp_path / "a").rmdir()
        return real(path, *arguments)

    monkeypatch.setattr(lock.os, "open", vanishing)
    with locked(tmp_path / "a" / "out"):
        assert seen
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_no_lock_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(SpikeLLMError, match="cannot write"), locked(tmp_path / "a" / "b" / "out"):
        pytest.fail("entered")
    assert not list(tmp_path.iterdir())


def test_who_it_is_may_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    with locked(tmp_path / "out"):
        for text in ("", "[]", '{"pid": 1}'):
            (tmp_path / ".out.holder").write_text(text)
            with pytest.raises(RequestError, match="another process"), locked(tmp_path / "out"):
                pytest.fail("entered")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file is a file"), locked(tmp_path / "file" / "a" / "b"):
        pytest.fail("entered")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock.FileLock, "acquire", refuse)
    with pytest.raises(SpikeLLMError, match="cannot write"), locked(tmp_path / "out"):
        pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
