from __future__ import annotations

from typing import Any

import pytest

from spikellm.core import io
from spikellm.core.io import (
    PlainDataError,
    difference_in_words,
    leaves,
    parse_json,
    read_yaml,
)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "recipe.a.b (1, now 2)"),
        ({"name": "x", "z": 1}, {"name": "y", "z": 2}, "recipe.z (1, now 2)"),
        ({"a": None}, {}, "recipe.a (null, now null)"),
        ({"a\n": 1}, {"a\n": 2}, r"'recipe.a\n' (1, now 2)"),
        ([1], {"a": 1}, 'recipe ([1], now {"a": 1})'),
    ],
)
def test_the_first_difference(before: Any, now: Any, expected: str) -> None:
    assert difference_in_words("recipe", before, now) == expected


def test_leaves() -> None:
    assert list(leaves({"a": {"b": [1, {"c": "x"}]}, "d": None})) == [
        (("a", "b"), 1),
        (("a", "b", "c"), "x"),
        (("d",), None),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("a: 1", {"a": 1}),
        ("{a: {b: 1}, c: {b: 2}}", {"a": {"b": 1}, "c": {"b": 2}}),
        ("['&a', '*b']", ["&a", "*b"]),
        ("a: [1, 2.5, null, true]", {"a": [1, 2.5, None, True]}),
        ("[" * 3 + "]" * 3, [[[]]]),
    ],
)
def test_plain_yaml(text: str, found: Any) -> None:
    assert read_yaml(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1", "line 1: anchors and aliases are not read"),
        ("a: 1\nb: &x [1]\nc: *x", "line 2: anchors"),
        ("*x", "line 1: anchors"),
        ("a: !!map &x {b: 1}", "line 1: anchors"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        ("c: {a: 1, 'a': 1}", "line 1: the key 'a' is there twice"),
        ("{1: a, 1.0: b}", "the key '1.0' is there twice"),
        ("<<: {a: 1}", "line 1: merge keys"),
        ("[" * 5000, "line 1: nested deeper than 100"),
        ("- " * 200 + "a", "nested deeper than 100"),
        ("? [1]\n: 2", "unhashable"),
        ("a: 1\n---\nb: 2", "single document"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("a: 2022-13-45", "not YAML"),
        ("a: [", "not YAML"),
        ("x" * ((1 << 20) + 1), "1,048,577 characters, expected at most"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlainDataError, match=message) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)


def test_yaml_of_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "MOST_NODES", 10)
    assert read_yaml("[1, 2, 3]") == [1, 2, 3]
    with pytest.raises(PlainDataError, match="more than 10 values"):
        read_yaml(f"[{'1, ' * 20}]")


def test_json_of_bounded_depth() -> None:
    assert parse_json("[" * 90 + "]" * 90)
    for text, message in (
        ("[" * 150 + "]" * 150, "nested deeper than 100"),
        ('{"a":' * 150 + "1" + "}" * 150, "nested deeper than 100"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("{", "not JSON"),
    ):
        with pytest.raises(PlainDataError, match=message):
            parse_json(text)
