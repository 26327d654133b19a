"""Standard output and standard error as a program finds them: full, closed, without a reader, or of
few characters.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from spikellm.core.errors import SpikeLLMError


class ReaderGone(Exception):  # noqa: N818  nothing is wrong: who read our output has seen enough
    """The reader of standard output went away.

    No error of the system's, which libraries between here and there would act on.
    """


class _Guarded:
    """A stream that is used as before, but for what happens when it cannot be written to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        with suppress(OSError, ValueError):  # what is still buffered has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Output(_Guarded):
    """Results: without them the work was for nothing, unless nobody wants to read on."""

    def _fail(self, error: OSError) -> None:
        super()._fail(error)
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from None
        raise SpikeLLMError(
            f"cannot write to standard output: {error.strerror or error}; free space, or send it"
            " elsewhere"
        ) from None


class _Progress(_Guarded):
    """Progress and errors: the work goes on without a reader."""


@contextmanager
def guarded() -> Iterator[None]:
    """Within, a standard output that fails raises :class:`ReaderGone` or one line, a standard error
    that fails is silent, and what neither can encode is written as an escape.
    """
    own = sys.stdout, sys.stderr
    for stream in own:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if own[0] is not None:
        sys.stdout = cast(TextIO, _Output(own[0]))
    if own[1] is not None:
        sys.stderr = cast(TextIO, _Progress(own[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = own


def require_output() -> None:
    """Ask for a standard output, before the work whose result it gets.

    Raises:
        SpikeLLMError: it is closed.
    """
    if sys.stdout is None:
        raise SpikeLLMError("standard output is closed; send it to a file, a program or /dev/null")


def encodes(text: str, encoding: str | None = None) -> bool:
    """Whether an encoding, UTF-8 by default, has all characters of a text."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
