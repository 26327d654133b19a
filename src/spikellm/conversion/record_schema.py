"""The record of a conversion, as plain data that may be anything: in ``config.json``, and block by
block in the journal of a conversion that was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MOST_ERROR = 1e300  # a mean square, absolute or relative
_BLOCK = {"name", "loss", "relative_loss", "layers"}
_CALIBRATION = {"windows": int, "seqlen": int, "sha256": str}


def wrong_in_block(data: Any) -> str | None:
    """What is wrong with the record of one block; None if nothing is."""
    checks: dict[str, Callable[[Any], bool]] = {
        "name": _is_line,
        "loss": _is_error,
        "relative_loss": _is_error,
        "layers": _are_lines,
        "dropped": _are_lines,
        "notes": _are_lines,
        "rotated": (
            lambda value: (
                isinstance(value, dict)
                and all(_is_line(key) and _is_count(count) for key, count in value.items())
            )
        ),
    }
    if not isinstance(data, dict) or not _BLOCK <= data.keys() <= checks.keys():
        return f"a record of a block does not hold {', '.join(checks)}"
    return next(
        (
            f"{key} in the record of a block is {str(data[key])[:80]!r}"
            for key in data
            if not checks[key](data[key])
        ),
        None,
    )


def wrong_in_record(data: Any) -> str | None:
    """What is wrong with the record of a whole conversion; None if nothing is."""
    if not isinstance(data, dict) or not {"blocks", "calibration", "versions"} <= data.keys():
        return "it lacks blocks, calibration or versions"
    blocks, calibration, versions = data["blocks"], data["calibration"], data["versions"]
    if not isinstance(blocks, list):
        return "blocks is no list"
    if not isinstance(calibration, dict) or not all(
        _is_line(calibration.get(key)) if kind is str else _is_count(calibration.get(key))
        for key, kind in _CALIBRATION.items()
    ):
        return f"calibration does not hold {', '.join(_CALIBRATION)}"
    if not isinstance(versions, dict) or not all(
        _is_line(key) and _is_line(value) for key, value in versions.items()
    ):
        return "versions does not hold one by package"
    if not all(_is_line(data.get(key, "")) for key in ("model", "device")):
        return "model or device is no line of text"
    return next((problem for block in blocks if (problem := wrong_in_block(block))), None)


def _is_error(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= MOST_ERROR  # NaN is not


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _are_lines(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_line, value))
