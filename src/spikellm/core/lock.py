"""A folder is written by one process at a time.

The lock is a file beside the folder, held by the operating system for as long as its process lives;
a second file says who holds it. Both are gone when the work is done. What a killed process leaves
of them holds nobody up.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from spikellm.core.errors import RequestError
from spikellm.core.files import cannot_write
from spikellm.core.io import PlainDataError, read_json

_PATIENCE = 0.5  # seconds until who has just taken the lock has said so
_TRIES = 1000  # to lock a file, or make a folder, that others remove


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing ``target`` in the meantime.

    Raises:
        RequestError: another one does, it says which, and since when; or a file stands where a
            folder is needed.
        SpikeLLMError: the file system refused.
    """
    target = target.resolve()
    path, holder = (target.with_name(f".{target.name}.{end}") for end in ("lock", "holder"))
    made: set[Path] = set()
    try:
        try:
            lock = _acquire(path, made)
        except Timeout:
            raise RequestError(
                f"{target} is being written by {_who(holder)}; wait until it has ended, or choose"
                " another folder"
            ) from None
        except OSError as error:
            raise cannot_write(target, error) from None
        try:
            _say_who(holder)
            yield
        finally:
            holder.unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # by who holds it alone, see _acquire
            lock.release()
    finally:
        for folder in sorted(made, reverse=True):  # the innermost first
            with suppress(OSError):  # it holds something now, or is gone
                folder.rmdir()


def _make_parents(target: Path, made: set[Path]) -> None:
    """Make the folders above a target; ``made`` takes up those that were not there.

    Raises:
        RequestError: one of them is a file.
        FileNotFoundError: another process has removed one meanwhile.
        OSError: the file system refused.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    there = target.parents[len(missing)]
    if not stat.S_ISDIR(there.stat().st_mode):
        raise RequestError(f"{there} is a file, expected a folder to write in; choose another name")
    if missing:
        made.update(missing)
        target.parent.mkdir(parents=True, exist_ok=True)


def _acquire(path: Path, made: set[Path]) -> FileLock:
    """Lock the file that stands at ``path``, and not one that its former holder has removed.

    Makes the folders above it, which a former holder may remove too.

    Args:
        made: takes up the folders that were not there.

    Raises:
        Timeout: another process has it.
        RequestError: a file stands where a folder is needed.
        OSError: the file system refused.
    """
    for left in reversed(range(_TRIES)):
        try:
            _make_parents(path, made)
            new = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a folder above has gone in between
            if left:
                continue
            raise
        try:
            lock = FileLock(str(path))
            lock.acquire(timeout=0)
            # The file that was opened is still there, so the lock, taken in between, is on it.
            if _is_at(path, descriptor):
                return lock
            lock.release()
        except Timeout:
            raise
        except OSError:
            if new:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "its lock is removed again and again")


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _say_who(holder: Path) -> None:
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with suppress(OSError):  # for people alone
        holder.write_text(json.dumps(who), encoding="utf-8")


def _who(holder: Path) -> str:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        with suppress(PlainDataError, OSError, KeyError, TypeError):
            found = read_json(holder)
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        time.sleep(_PATIENCE / 10)
    return "another process"
