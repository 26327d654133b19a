"""YAML and JSON from files that nobody vouches for: of bounded size, and not nested without end."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 20  # of a YAML file
MOST_JSON_BYTES = 100_000_000  # of a JSON file: as many as the header of a shard may have
MOST_NODES = 100_000  # values and keys of YAML
MOST_DEPTH = 100
_MERGE = "tag:yaml.org,2002:merge"
_INTEGER, _STRING = "tag:yaml.org,2002:int", "tag:yaml.org,2002:str"


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


class _Loader(yaml.SafeLoader):
    """Plain data without anchors and aliases, of bounded size and depth, each key once; ``2:4`` is
    a string, as in YAML 1.2, not a number to base sixty.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise _refused("anchors and aliases are not read, write the value again", event)
        self._depth += 1
        self._nodes += 1
        if self._depth > MOST_DEPTH:
            raise _refused(f"nested deeper than {MOST_DEPTH}", event)
        if self._nodes > MOST_NODES:
            raise _refused(f"more than {MOST_NODES:,} values", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _STRING if tag == _INTEGER and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                raise _refused("merge keys are not read, write the values again", key)
            value = self.construct_object(key, deep=True)
            if isinstance(value, Hashable):
                if value in known:
                    raise _refused(f"the key {key.value!r} is there twice", key)
                known.add(value)
        return super().construct_mapping(node, deep)


def _refused(problem: str, place: Any) -> PlainDataError:
    return PlainDataError(f"line {place.start_mark.line + 1}: {problem}")


def read_yaml(text: str) -> Any:
    """YAML of plain data.

    Raises:
        PlainDataError: not YAML, with anchors or a key twice, larger than :data:`MOST_BYTES` or
            than :data:`MOST_NODES` values, nested deeper than :data:`MOST_DEPTH`.
    """
    if len(text) > MOST_BYTES:
        raise PlainDataError(f"{len(text):,} characters, expected at most {MOST_BYTES:,}")
    with _told("YAML"):
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()


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
    with _told("JSON"):
        data = json.loads(text)
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise PlainDataError(f"JSON that is nested deeper than {MOST_DEPTH}")
        if isinstance(value, (dict, list)):
            parts = value.values() if isinstance(value, dict) else value
            waiting += [(part, depth + 1) for part in parts]
    return data


@contextmanager
def _told(kind: str) -> Iterator[None]:
    """Errors of a parser in one line."""
    try:
        yield
    except RecursionError:
        raise PlainDataError(f"{kind} that is nested too deeply") from None
    except PlainDataError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise PlainDataError(f"not {kind} ({' '.join(str(error).split())[:200]})") from None


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
