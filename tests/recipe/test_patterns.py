from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from spikellm.core.errors import RecipeError
from spikellm.recipe.load import load_recipe
from spikellm.recipe.patterns import MOST_WAYS, ways

NAME = "a" * 200
ORDINARY = [
    ".*",
    ".*(up|down)_proj",
    r"layers\.[0-9]+\..*",
    ".*2.mlp.(up|down)_proj",
    r".*layers\..*\.mlp\..*proj",
    r"model\.layers\.(0|1|10|11|2|23)\..*",
    r"(?!.*down).*_proj",
    r"model\.layers\.\d{1,2}\.(self_attn\.)?[qk]_proj",
    "(?i)MODEL.*",
    "(up|down)*",
    ".*a.*a.*a.*a!",
    "(.*)(.*)(.*)(.*)!",
    ".*?.*?.*?.*?!",
    "[^!]*[^!]*[^!]*[^!]*!",
    "a*+b",
    "(a?b?c?){2}",
]
HOSTILE = [
    "(.+)+!",
    "(.*)*!",
    "(a|aa)+!",
    "(a|a)*!",
    "(a|ab|b)*!",
    "(?:.a|a.)*!",
    "(?i)(?:ax|Ax)*!",
    "(x+x+)+y",
    "(a?){100}!",
    "a?" * 30 + "a" * 30,
    "(?:(?:(?:){1000}){1000}){1000}",
    ".*" * 6 + "!",
    "(.{1,150}){3,150}!",
    "(.*)" * 5 + "!",
    ".{0,199}" * 6,
    "(?=(a+)+!)",
    "(?!(a+)+!).*",
    r"((.*)\2)+!",
    "((a{1,9}){1,9}){1,9}!",
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_stay_valid_and_are_quick(pattern: str) -> None:
    if "*+" in pattern and not hasattr(re, "NOFLAG"):
        pytest.skip("possessive repeats came with Python 3.11")
    recipe = load_recipe("w4a4-t2", [f"overrides=[{{match: '{pattern}', skip: true}}]"])
    assert recipe.unmatched_overrides([NAME]) == ([] if re.fullmatch(pattern, NAME) else [pattern])


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_would_never_end_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match="may take for ever to match"):
        load_recipe("w4a4-t2", [f"overrides=[{{match: '{pattern}', skip: true}}]"])


def test_what_is_long_nested_or_many() -> None:
    for pattern, message in (
        ("a" * 1001, "1,001 characters; expected at most 1,000"),
        ("(", "not a regular expression"),
        ("(" * 450 + ")" * 450, None),
    ):
        try:
            ways(pattern)
        except ValueError as error:
            assert (message or "nested too deeply") in str(error)  # noqa: PT017
        else:
            assert message is None
    many = ", ".join(["{match: '.*a.*b.*c.*d', skip: true}"] * 4)
    with pytest.raises(RecipeError, match="together"):
        load_recipe("w4a4-t2", [f"overrides=[{many}]"])


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^b]", "", "^", "$", "(?=a)"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "*?", "{2,150}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=12,
)


@given(PATTERNS)
@examples(300)
def test_what_is_accepted_ends_soon(pattern: str) -> None:
    try:
        cost = ways(pattern)
    except ValueError:
        return
    found = re.compile(f"(?:{pattern})!")
    for name in (NAME, "ab" * 100, "b" * 100 + "a" * 100):
        found.fullmatch(name)  # what is refused takes years
    assert 1 <= cost <= MOST_WAYS
