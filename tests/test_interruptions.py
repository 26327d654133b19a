"""A conversion is killed, or the file system fails it, at many moments: nothing half-written looks
whole, and going on ends in the same bytes.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import spikellm
from budget import mostly_slow
from conftest import BUNDLED
from interruptions import bytes_of, convert, counting, die_at, ended, forked, kill_after
from spikellm.conversion import journal
from spikellm.core import files
from spikellm.core.errors import CheckpointError, SpikeLLMError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SLOW_POINTS, SLOW_MOMENTS = 32, 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Any]:
    """An uninterrupted conversion: its bytes, its number of operations on files, its seconds."""
    place = tmp_path_factory.mktemp("whole")
    (place / "count").write_text("")
    started = time.monotonic()

    def work() -> None:
        counter = os.open(place / "count", os.O_WRONLY)
        counting(place / "work", lambda number: os.pwrite(counter, str(number).encode(), 0))
        convert(BUNDLED, place / "work" / "out", text_file)

    (place / "work").mkdir()
    assert ended(forked(work)) == 0
    return {
        "bytes": bytes_of(place / "work" / "out"),
        "operations": int((place / "count").read_text()),
        "seconds": time.monotonic() - started,
    }


def check_and_resume(out: Path, text_file: Path, whole: dict[str, Any]) -> None:
    """What is under the name is nothing or all of it.

    Going on ends in the same bytes and leaves nothing beside.
    """
    if out.exists():
        assert bytes_of(out) == whole["bytes"]
    assert ended(forked(lambda: convert(BUNDLED, out, text_file, resume=True))) == 0
    assert bytes_of(out) == whole["bytes"]
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing is left beside"


def killed_at(wanted: int, out: Path, text_file: Path) -> None:
    def work() -> None:
        counting(out.parent, die_at(wanted))
        convert(BUNDLED, out, text_file)

    assert ended(forked(work)) == -signal.SIGKILL


@pytest.mark.parametrize("share", mostly_slow([0.02, 0.3, 0.6, 0.9, 1.0], {0.3, 1.0}))
def test_killed_at_an_operation(
    share: float, whole: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    killed_at(max(1, round(share * whole["operations"])), tmp_path / "out", text_file)
    check_and_resume(tmp_path / "out", text_file, whole)


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_many_operations(whole: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    points = sorted(
        {
            1 + round(point * (whole["operations"] - 1) / (SLOW_POINTS - 1))
            for point in range(SLOW_POINTS)
        }
    )
    assert len(points) == SLOW_POINTS
    for point in points:
        place = tmp_path / str(point)
        place.mkdir()
        killed_at(point, place / "out", text_file)
        check_and_resume(place / "out", text_file, whole)


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments(whole: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    """Anywhere: while weights are read, in a product, half-way through a write of the safetensors
    library. Killed again and again until it ends.
    """
    draw, killed = random.Random(0), 0  # noqa: S311
    for turn in range(4 * SLOW_MOMENTS):  # on a busy machine many end before they are killed
        if killed >= SLOW_MOMENTS:
            break
        out = tmp_path / str(turn) / "out"
        out.parent.mkdir()
        for attempt in range(3):
            child = forked(
                lambda out=out, attempt=attempt: convert(
                    BUNDLED, out, text_file, resume=attempt > 0
                )
            )  # type: ignore[misc]
            kill_after(child, draw.uniform(0, 1.1) * whole["seconds"])
            status = ended(child)
            killed += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
            if out.exists():
                assert bytes_of(out) == whole["bytes"]
        check_and_resume(out, text_file, whole) if status else None
        assert bytes_of(out) == whole["bytes"]
    assert killed >= SLOW_MOMENTS


def test_killed_while_it_replaces_an_older_result(
    whole: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(BUNDLED, out, text_file, recipe="w8a8")
    older = bytes_of(out)
    for point in (12, whole["operations"] - 4):

        def work(point: int = point) -> None:
            counting(tmp_path, die_at(point))
            convert(BUNDLED, out, text_file, force=True)

        assert ended(forked(work)) == -signal.SIGKILL
        assert not out.exists() or bytes_of(out) in (older, whole["bytes"])
        assert ended(forked(lambda: convert(BUNDLED, out, text_file, resume=True))) == 0
        assert bytes_of(out) == whole["bytes"]
        convert(BUNDLED, out, text_file, recipe="w8a8", force=True)


@pytest.mark.parametrize("failing", [1, 3, 6])
def test_a_full_disk(
    failing: int,
    whole: dict[str, Any],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each flush to disk fails once: one line, and then it goes on."""
    calls, flush = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SpikeLLMError, match="No space left on device; free space"):
        convert(BUNDLED, tmp_path / "out", text_file)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(files.os, "fsync", flush)
    check_and_resume(tmp_path / "out", text_file, whole)


def test_an_unwritable_folder(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the system's refusal is made up."""

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SpikeLLMError, match=r"cannot write .*: Permission denied"):
        convert(BUNDLED, tmp_path / "out", text_file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["short", "header", "error"])
def test_damaged_journals(
    damage: str,
    whole: dict[str, Any],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed_at(round(0.7 * whole["operations"]), tmp_path / "out", text_file)
    block = next((tmp_path / "out.partial").glob("block-*.safetensors"))
    data = block.read_bytes()
    if damage == "error":
        with monkeypatch.context() as broken:
            broken.setattr(
                journal,
                "safe_open",
                lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
            )
            with pytest.raises(
                CheckpointError, match=r"is damaged \(.*Input/output error\); delete it"
            ):
                convert(BUNDLED, tmp_path / "out", text_file, resume=True)
    else:
        block.write_bytes(data[: len(data) // 2] if damage == "short" else b"\xff" * 16 + data[16:])
        with pytest.raises(CheckpointError, match=r"is damaged .*; delete it"):
            convert(BUNDLED, tmp_path / "out", text_file, resume=True)
        block.unlink()
    check_and_resume(tmp_path / "out", text_file, whole)


@pytest.mark.parametrize("name", ["out", "out[1]", "out*"])
def test_leftovers_of_other_targets_stay(name: str, tmp_path: Path) -> None:
    others = [tmp_path / other for other in (f"{name}.1", f"{name}.partial", "out1", "outer")]
    own, theirs = [], []
    for target, found in ((tmp_path / name, own), *((other, theirs) for other in others)):
        with files.folder_when_done(target) as folder:
            found += [folder.name, f"{folder.name}.old"]
    theirs.append(f".{name}.partial.tmp")
    for left in own + theirs:
        (tmp_path / left).mkdir()
    files.remove_leftovers(tmp_path / name)
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(theirs)


def test_a_half_written_result_is_never_loaded(
    whole: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    killed_at(whole["operations"] - 10, tmp_path / "out", text_file)
    for path in tmp_path.iterdir():
        if path.name.endswith(".partial"):
            with pytest.raises(SpikeLLMError):
                spikellm.load(path)
