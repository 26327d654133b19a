"""Names and places of tokens are those of the text that they make."""

from __future__ import annotations

import pytest
from hypothesis import given

from serving.test_text_stream import TOKENIZER, TOKENS
from spikellm.serving.hosts import may_be_called
from spikellm.serving.text import plain_text
from spikellm.serving.words import Words


@given(before=TOKENS, new=TOKENS)
def test_words_are_the_text_in_pieces(before: list[int], new: list[int]) -> None:
    words = Words(TOKENIZER, before)
    found = [words.add(token) for token in new]
    context = before[-6:]
    text = plain_text(TOKENIZER, [*context, *new])[len(plain_text(TOKENIZER, context)) :]
    if "\ufffd" not in plain_text(TOKENIZER, [*context, *new]):
        assert "".join(word.text for word in found) == text
        assert all(text[word.place :].startswith(word.text) for word in found)


def test_parts_of_characters_have_no_bytes() -> None:
    text = "é🙂 日本 ok"
    words = Words(TOKENIZER)
    found = [words.add(token) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    whole = [word for word in found if not word.text.endswith("\ufffd")]
    assert "".join(word.text for word in whole) == text
    assert all(text[word.place :].startswith(word.text) for word in whole)
    assert any(word.bytes is None for word in found)
    assert all(word.bytes == list(word.text.encode()) for word in found if word.whole)


def test_special_tokens_have_names_and_no_place() -> None:
    words = Words(TOKENIZER)
    first = words.add(TOKENIZER.eos_token_id)
    assert first.text == TOKENIZER.eos_token
    assert words.add(TOKENIZER("Return", add_special_tokens=False)["input_ids"][0]).place == 0


@pytest.mark.parametrize(
    ("bound", "header", "answered"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "LOCALHOST:8000", True),
        ("127.0.0.1", "localhost.", True),
        ("::1", "[::1]:8000", True),
        ("::1", "[0:0:0:0:0:0:0:1]", True),
        ("127.0.0.1", "evil.example:8000", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "192.0.2.1:8000", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", "anything.example", True),  # noqa: S104
    ],
)
def test_names_of_the_server(bound: str, header: str, answered: bool) -> None:
    assert may_be_called(bound, header) is answered
