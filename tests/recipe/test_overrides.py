from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikellm.core.errors import RecipeError
from spikellm.recipe import overrides
from spikellm.recipe.load import load_recipe
from spikellm.recipe.overrides import MOST_CHARACTERS, Pattern

NAMES = [f"model.layers.{n}.{part}_proj" for n in (0, 1, 10) for part in ("mlp.down", "attn.q")]
EXPRESSIONS = [
    ".*",
    ".*(up|down)_proj",
    r"model\.layers\.[0-9]+\..*",
    r"model\.layers\.(0|1|2|23)\..*",
    r"(?!.*down).*_proj",
    r"model\.layers\.\d{1,2}\.(attn\.)?[qk]_proj",
    "(?i)MODEL.*",
    "(a?b?c?){2}",
]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", [0, 1, 2, 3, 4, 5]),
        ("*.down_proj", [0, 2, 4]),
        ("model.layers.1.*", [2, 3]),
        ("model.layers.[01].*", [0, 1, 2, 3]),
        ("model.layers.?.attn.q_proj", [1, 3]),
        ("model.layers.1*.attn.q_proj", [3, 5]),
        ("down_proj", []),
        ("model.layers.0", []),
        ("MODEL*", []),
        ("model.layers.0.attn.q_proj", [1]),
    ],
)
def test_globs_match_whole_names(pattern: str, found: list[int]) -> None:
    assert [NAMES.index(name) for name in NAMES if Pattern(pattern).matches(name)] == found


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_match_as_python_does(text: str) -> None:
    pattern = Pattern(f"re:{text}")
    assert [pattern.matches(name) for name in NAMES] == [
        re.fullmatch(text, name) is not None for name in NAMES
    ]


@given(st.text("ab.*?[]!-_", max_size=12), st.text("ab._", max_size=12))
def test_any_glob_ends(pattern: str, name: str) -> None:
    if not pattern.startswith("."):
        assert Pattern(pattern).matches(name) in (True, False)
    assert Pattern("*a" * 400).matches("a" * 400 + "b") is False


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (".*down", "is a regular expression; write 're:.*down', or a glob"),
        (r"layers\.0", "is a regular expression"),
        ("(up|down)_proj", "is a regular expression"),
        ("re:(", "is not a regular expression"),
        ("re:" + "(" * 450 + ")" * 449, "is not a regular expression"),
        ("a" * (MOST_CHARACTERS + 1), "1,001 characters; expected at most 1,000"),
        ("re:a{1000000000}", "repeats more than 10,000 times"),
        ("re:((a{1,100}){1,100}){,100}", "repeats more than 10,000 times"),
        ("re:(?R)?a", "calls a group"),
        ("re:(a(?1)?b)*", "calls a group"),
        ("re:(?P<x>a(?&x))", "calls a group"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Pattern(pattern)


def test_an_expression_that_takes_for_ever_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overrides, "PATIENCE", 0.05)
    recipe = load_recipe("w4a4-t2", ["overrides=[{match: 're:(a|aa)+!', skip: true}]"])
    assert recipe.for_module("b") is not None
    with pytest.raises(RecipeError, match="takes longer than 0.05 s to match") as caught:
        recipe.for_module("a" * 200)
    assert "\n" not in str(caught.value)


def test_patience_is_for_all_names_together(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 100, 3))
    monkeypatch.setattr(overrides.time, "monotonic", lambda: float(next(times)))
    given: list[float] = []

    class Expression:
        def fullmatch(self, name: str, timeout: float) -> Any:
            given.append(timeout)

    pattern = Pattern("re:x")
    monkeypatch.setattr(pattern, "_expression", Expression())
    for name in ("a", "b", "b"):
        pattern.matches(name)
    assert given == [overrides.PATIENCE, pytest.approx(0.001)], "and no name is tried twice"


def test_overrides_choose_formats() -> None:
    recipe = load_recipe(
        "gptq-w4a16",
        [
            "weights.group_size=64",
            "overrides=[{match: '*.down_proj', weights: ternary}, {match: '*.0.*', weights:"
            " {format: partly-binary, salient_rate: 0.1}}, {match: 're:.*q_proj', weights: {bits:"
            " 8}}]",
        ],
    )
    found = [recipe.for_module(name) for name in NAMES]
    assert [one.weights.format for one in found if one] == [
        *["partly-binary"] * 2,
        *["ternary", "affine"] * 2,
    ]
    assert [one.weights.bits for one in found if one] == [4, 8, 2, 8, 2, 8]
    assert {one.weights.group_size for one in found if one} == {64}, "which all have, so it stays"


def test_overrides_that_only_clash_with_the_recipe() -> None:
    with pytest.raises(
        RecipeError, match=r"override '\*': unknown key 'weights.budget'.*'ternary'"
    ):
        load_recipe("gptq-w4a16", ["overrides=[{match: '*', weights: {budget: 1.4}}]"])
    with pytest.raises(RecipeError, match="unknown weight format 'magic'"):
        load_recipe("gptq-w4a16", ["overrides=[{match: '*', weights: magic}]"])
