"""YAML and JSON from files that nobody vouches for: of bounded size, also once aliases are followed, and not nested without end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 20  # of a YAML file
MOST_NODES = 100_000  # of YAML, aliases followed
MOST_DEPTH = 100


class PlainDataError(ValueError):
    """Data that cannot be read; one line."""


def read_yaml(text: str) -> Any:
    """YAML by the safe loader.

    Raises:
        PlainDataError: not YAML; larger than :data:`MOST_BYTES` or, with aliases followed, than :data:`MOST_NODES` values; nested deeper than :data:`MOST_DEPTH`.
    """
    if len(text) > MOST_BYTES:
        raise PlainDataError(f"{len(text):,} characters, expected at most {MOST_BYTES:,}")
    return _bounded(lambda: yaml.safe_load(text), "YAML")


def read_json(path: Path) -> Any:
    """JSON of a file.

    Raises:
        PlainDataError: not JSON, or nested deeper than :data:`MOST_DEPTH`.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlainDataError(f"not UTF-8 text ({error.reason})") from None
    return parse_json(text)


def parse_json(text: str) -> Any:
    """JSON of a text.

    Raises:
        PlainDataError: not JSON, or nested deeper than :data:`MOST_DEPTH`.
    """
    return _bounded(lambda: json.loads(text), "JSON", len(text) + 1)  # it has no aliases, so no more values than characters


def _bounded(read: Callable[[], Any], kind: str, most: int = MOST_NODES) -> Any:
    try:
        data = read()
    except RecursionError:
        raise PlainDataError(f"{kind} that is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise PlainDataError(f"not {kind} ({' '.join(str(error).split())[:200]})") from None
    waiting, seen = [(data, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen + len(waiting) > most or depth > MOST_DEPTH:
            raise PlainDataError(
                f"{kind} that grows beyond all bounds once its aliases are followed, or is nested deeper than {MOST_DEPTH}"
            )
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, (list, set, tuple)):
            waiting += [(part, depth + 1) for part in value]
    return data
