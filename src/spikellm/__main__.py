"""The program ``spikellm``, also ``python -m spikellm``: runs a command and turns what goes wrong
into one line and an exit status.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback

import typer

from spikellm.cli import app
from spikellm.core import console, streams
from spikellm.core.errors import SpikeLLMError
from spikellm.core.files import is_gone

_SIGINT = 130
_INTERRUPTED = "interrupted; a conversion goes on where it stopped with --resume"


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 the work failed, 2 the request was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in itertools.takewhile(lambda word: word.startswith("-"), arguments)
    quiet_libraries(debug)
    with streams.guarded():
        try:
            streams.require_output()
            status = app(args=arguments, standalone_mode=False)
            sys.stdout.flush()
            if status == _SIGINT:
                return _fail(_INTERRUPTED, _SIGINT)
            return status if isinstance(status, int) else 0
        except (typer.Abort, KeyboardInterrupt):
            return _fail(_INTERRUPTED, _SIGINT)
        except streams.ReaderGone:
            return 0
        except Exception as error:
            if debug:
                traceback.print_exc()
            return _fail(*_in_words(error, arguments))


def _in_words(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """What went wrong in one line, and the exit status."""
    if isinstance(error, SpikeLLMError):
        return str(error), error.exit_status
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        known = getattr(getattr(error, "ctx", None), "parent", None) is not None
        verb = f"{arguments[0]} " if known else ""
        words = error.format_message().rstrip(".").replace(": Value error, ", ": ", 1)
        return f"{words} (see spikellm {verb}--help)", 2
    if isinstance(error, FileNotFoundError) and is_gone():
        gone = "the current folder was deleted or replaced; change to one that exists"
        return f"{gone}, then run again", 2
    found = " ".join(str(error).split()) or "no message"
    hint = "(run again with `spikellm --debug …` for a traceback)"
    return f"unexpected {type(error).__name__}: {found} {hint}", 1


def quiet_libraries(debug: bool) -> None:
    """Keep the libraries' own progress bars and warnings off standard error unless debugging."""
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _fail(message: str, status: int) -> int:
    console.speak(True)
    several = (os.environ.get("WORLD_SIZE") or "1") != "1" and "RANK" in os.environ
    rank = f" (rank {os.environ['RANK']})" if several else ""
    console.note(f"spikellm: error{rank}: {' '.join(message.split())}")
    return status


if __name__ == "__main__":
    sys.exit(main())
