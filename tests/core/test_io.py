from __future__ import annotations

from typing import Any

import pytest

from spikellm.core.io import difference_in_words, leaves


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
