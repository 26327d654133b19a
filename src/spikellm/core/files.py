"""Writing files so that nothing half-written is ever left looking whole."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from spikellm.core.errors import RequestError, SpikeLLMError

MODEL = "config.json"
"""The file that tells a folder with a model from others."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it, and rename it to ``path``.

    Raises:
        SpikeLLMError: the file system refused (full, read-only); the temporary file is removed.
    """
    temporary = temporary_name(path)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text to a file, whole or not at all; a pipe or a device is written to, not replaced.

    Raises:
        SpikeLLMError: the file system refused.
    """
    if exists(path) and not path.is_file():
        try:
            with path.open("w", encoding="utf-8") as special:
                special.write(text)
        except OSError as error:
            raise cannot_write(path, error) from None
    else:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def temporary_name(path: Path) -> Path:
    """Where a file is written before it has its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def folder_when_done(target: Path, *, overwrite: bool = False, mark: str = MODEL) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` when the block ends well and
    vanishes when it does not.

    Raises:
        RequestError: ``target`` exists, is not empty, and may not be overwritten (see
            :func:`require_free`).
        SpikeLLMError: the file system refused.
    """
    target = target.resolve()
    require_free(target, overwrite=overwrite, mark=mark)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        )
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise cannot_write(target, error) from None
    try:
        yield temporary
        for path in temporary.rglob("*"):  # some writers leave their files to the owner alone
            if path.is_file():
                path.chmod(0o666 & ~_umask())
        _swap_in(temporary, target)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exists(path: Path) -> bool:
    """Whether there is something at a path.

    Not at one that the system refuses, such as a name that is too long.
    """
    try:
        return path.exists()
    except OSError:
        return False


class Source(NamedTuple):
    """A file or a folder that is read; of a folder every file, or those with some suffixes, which
    are in small letters here.
    """

    path: Path
    suffixes: tuple[str, ...] = ()

    def includes(self, target: Path) -> bool:
        """Whether a file at ``target`` is, or would be, part of what is read."""
        if not exists(self.path):
            return False
        own, found = self.path.resolve(), target.resolve()
        return found == own or (
            found.is_relative_to(own)
            and (not self.suffixes or found.suffix.lower() in self.suffixes)
        )


def require_name(target: Path, *beside: str) -> None:
    """Refuse a target whose name, or names that are needed beside it, the file system does not
    take.
    """
    for name in (target.name, *beside):
        try:
            target.with_name(name).is_symlink()
        except OSError as error:
            raise RequestError(f"{target}: {error.strerror}; choose another name") from None


def require_folder_name(target: Path) -> None:
    """The same of a folder that :func:`folder_when_done` is to write."""
    require_name(target, f".{target.name}.________.tmp.old")


def require_free(target: Path, *, overwrite: bool = False, mark: str = MODEL) -> None:
    """Refuse a target that is no folder, that is or holds the current one, or that holds something,
    unless it is to be overwritten and holds the file ``mark``, as what
    is written will."""
    require_folder_name(target)
    if not is_gone() and Path.cwd().is_relative_to(target.resolve()):
        raise RequestError(
            f"{target} is, or holds, the current folder, which a new one would take the place of;"
            " give another folder, or run from elsewhere"
        )
    for part in (target, *target.parents):
        if part.exists() or part.is_symlink():
            if not part.is_dir():
                raise RequestError(
                    f"{part} is a file, expected a folder to write"
                    f" {'to' if part == target else 'in'}; choose another name"
                )
            break
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / mark).is_file():
        raise RequestError(
            f"folder {target} is not empty and holds no {mark}, so it is nothing that may be"
            " overwritten; choose another one, or empty it"
        )
    if not overwrite:
        raise RequestError(
            f"folder {target} exists and is not empty; choose another one, or overwrite it (--force"
            " on the command line, overwrite=True in Python)"
        )


def is_gone() -> bool:
    """Whether the current folder was deleted or replaced."""
    try:
        Path.cwd()
    except OSError:
        return True
    return False


def require_outside(target: Path, *sources: str | Path) -> None:
    """Refuse a target that is, or holds, one of the files and folders to be read: overwriting it
    would remove them.
    """
    for source in map(Path, sources):
        if exists(source) and source.resolve().is_relative_to(target.resolve()):
            raise RequestError(
                f"{target} holds {source}, which is to be read; choose another folder to write to"
            )


def remove_leftovers(target: Path) -> None:
    """Remove temporary folders that interrupted writers of ``target`` left beside it."""
    target = target.resolve()
    own = re.compile(
        rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.tmp(\.old)?"
    )  # in the middle what mkdtemp makes up
    for path in target.parent.glob(".*"):
        if own.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> SpikeLLMError:
    """One line for a refusal of the file system."""
    return SpikeLLMError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another place, then"
        " run again"
    )


def _swap_in(temporary: Path, target: Path) -> None:
    old = temporary.with_name(f"{temporary.name}.old")
    full = target.is_dir() and any(target.iterdir())
    if full:
        target.replace(old)
    try:
        temporary.replace(target)
    except OSError:
        if full:
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
