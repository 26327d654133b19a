"""YAML and JSON from files that nobody vouches for: of bounded size, also once aliases are
followed, and not nested without end.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 20  # of a YAML file
MOST_JSON_BYTES = 100_000_000  # of a JSON file: as many as the header of a shard may have
MOST_NODES = 100_000  # of YAML, aliases followed
MOST_DEPTH = 100


class PlainDataError(ValueError):
    """Data that cannot be read; one line."""


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Text of a file or a pipe, of which no more is read than is allowed.

    Raises:
        PlainDataError: more than ``most`` bytes, not UTF-8, or a device.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        kind = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise PlainDataError("neither a file nor a pipe")
        data = file.read(most + 1)
    if len(data) > most:
        raise PlainDataError(f"more than {most:,} bytes, expected at most that")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlainDataError(f"not UTF-8 text ({error.reason})") from None


def read_yaml(text: str) -> Any:
    """YAML by the safe loader.

    Raises:
        PlainDataError: not YAML; larger than :data:`MOST_BYTES` or, with aliases followed, than
            :data:`MOST_NODES` values; nested deeper than :data:`MOST_DEPTH`.
    """
    if len(text) > MOST_BYTES:
        raise PlainDataError(f"{len(text):,} characters, expected at most {MOST_BYTES:,}")
    return _bounded(lambda: yaml.safe_load(text), "YAML")


def read_json(path: Path) -> Any:
    """JSON of a file.

    Raises:
        PlainDataError: not JSON, larger than :data:`MOST_JSON_BYTES`, or nested deeper than
            :data:`MOST_DEPTH`.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, MOST_JSON_BYTES))


def parse_json(text: str) -> Any:
    """JSON of a text.

    Raises:
        PlainDataError: not JSON, or nested deeper than :data:`MOST_DEPTH`.
    """
    return _bounded(
        lambda: json.loads(text), "JSON", len(text) + 1
    )  # it has no aliases, so no more values than characters


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
                f"{kind} that grows beyond all bounds once its aliases are followed, or is nested"
                f" deeper than {MOST_DEPTH}"
            )
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, (list, set, tuple)):
            waiting += [(part, depth + 1) for part in value]
    return data


def leaves(data: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values within plain data that hold no others, each with the keys that lead to it.

    Places in lists are no keys.
    """
    if isinstance(data, dict):
        for key, part in data.items():
            yield from leaves(part, (*place, str(key)))
    elif isinstance(data, list):
        for part in data:
            yield from leaves(part, place)
    else:
        yield place, data


def difference_in_words(field: str, before: Any, now: Any) -> str:
    """The first field, by its name with dots, in which two different values of plain data differ,
    and its values. Names and descriptions come last: they tell of the others.
    """
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return (
            f"{field if field.isprintable() else repr(field)} ({_short(before)}, now {_short(now)})"
        )
    keys = sorted(before.keys() | now.keys(), key=lambda key: (key in {"name", "description"}, key))
    differing = next(
        key for key in keys if (key in before, before.get(key)) != (key in now, now.get(key))
    )
    return difference_in_words(f"{field}.{differing}", before.get(differing), now.get(differing))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
