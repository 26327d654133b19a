"""Conversions that are killed: run in forked processes, so that each takes a second."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spikellm.commands import convert as convert_command
from spikellm.commands.convert import ConvertOptions

_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
    "os.truncate",
}


def forked(work: Callable[[], object]) -> int:
    """Start work in a forked process that has no other threads; gives its process number.

    Its exit status is 0 if work ended without an exception.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Exit status of a forked process, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counting(place: Path, on_event: Callable[[int], object]) -> None:
    """From now on call ``on_event`` with the number of every operation of Python on files within a
    folder.
    """
    count, own = 0, str(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _EVENTS and own in str(arguments):
            count += 1
            on_event(count)

    sys.addaudithook(hook)


def die_at(wanted: int) -> Callable[[int], None]:
    """Kills the process at an operation."""
    return lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == wanted else None


def kill_after(child: int, seconds: float) -> None:
    """Kill a process a while from now, unless it has ended by then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def convert(model: Path, out: Path, text: Path, **more: Any) -> None:
    """A small conversion to a folder; ``more`` as :class:`ConvertOptions` has it."""
    options = ConvertOptions(calibration=str(text), samples=2, seqlen=32, **more)
    convert_command.convert(str(model), out, options)


def bytes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
