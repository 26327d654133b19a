"""The project's own errors.

Each message says what was found, what was expected and what to do next, in one line.
"""

from __future__ import annotations

_LONGEST = 1200  # characters of a message


class SpikeLLMError(Exception):
    """Base of the errors that this package raises on purpose.

    A quotation from a file may have any length, so the middle of a long message is left out.

    Attributes:
        exit_status: of the command line: 2 where the request was wrong, 1 where the work failed.
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(
            message
            if len(message) <= _LONGEST
            else f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 3 :]}"
        )


class RequestError(SpikeLLMError, ValueError):
    """What was asked for cannot be done: a missing path, an unknown name, a value out of range."""

    exit_status = 2


class RecipeError(RequestError):
    """A recipe that cannot be read, or whose values do not fit together."""


class UnsupportedModelError(RequestError):
    """A model whose structure cannot be converted exactly; the message names the part."""


class CheckpointError(SpikeLLMError):
    """A folder of weights that is incomplete, damaged or does not fit its configuration."""


class NumericalError(SpikeLLMError):
    """NaN or infinity where a finite number is needed.

    The message names the tensor or the block.
    """


class DependencyError(SpikeLLMError):
    """Something outside the package is missing: a network, a package, a compiler."""
