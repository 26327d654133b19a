"""Requests are read whole or refused by the field that is at fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spikellm.serving.protocol import (
    BadRequestError,
    ChatRequest,
    CompletionRequest,
    read_request,
)

PLAIN = {"model": "m", "prompt": "a"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n:"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"suffix": "b"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream_options": {"more": True}}, "stream_options"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"model": None}, "model"),
    ],
)
def test_fields_out_of_range_are_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        read_request(CompletionRequest, json.dumps({**PLAIN, **changed}).encode())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)
def test_chats_that_cannot_be_had_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        read_request(ChatRequest, json.dumps({**CHAT, **changed}).encode())


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b'"a"', b"[" * 100_000])
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        read_request(CompletionRequest, body)


def test_fields_that_ask_for_nothing_are_taken() -> None:
    given = {**CHAT, "tools": [], "response_format": {"type": "text"}, "user": "me", "n": None}
    found = read_request(ChatRequest, json.dumps(given).encode())
    assert found.choices == 1


def test_prompts_are_texts_or_tokens() -> None:
    for given, wanted in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        found = read_request(CompletionRequest, json.dumps({**PLAIN, "prompt": given}).encode())
        assert isinstance(found, CompletionRequest)
        assert found.prompts == wanted


@pytest.mark.parametrize(
    "prompt", [[], [None] * 300_000, [1.0], [True], ["a", 1], [[1], "a", [None]]]
)
def test_prompts_that_are_neither(prompt: Any) -> None:
    with pytest.raises(BadRequestError, match="prompt"):
        read_request(CompletionRequest, json.dumps({**PLAIN, "prompt": prompt}).encode())


def test_an_answer_can_be_sent_back() -> None:
    """As the official client gives it."""
    said = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}
    given = {**CHAT, "messages": [*CHAT["messages"], said, *CHAT["messages"]]}
    found = read_request(ChatRequest, json.dumps(given).encode())
    assert isinstance(found, ChatRequest)
    assert [message.plain()["content"] for message in found.messages] == ["a", "b", "a"]


@pytest.mark.parametrize("text", [r"\ud800", r"a\udfff"])
def test_half_a_character_is_no_text(text: str) -> None:
    with pytest.raises(BadRequestError):
        read_request(CompletionRequest, f'{{"model": "m", "prompt": "{text}"}}'.encode())


def test_stops_are_few_and_not_empty() -> None:
    for stop in ("", ["a", ""], ["a"] * 5):
        found = read_request(CompletionRequest, json.dumps({**PLAIN, "stop": stop}).encode())
        with pytest.raises(BadRequestError, match="stop"):
            _ = found.stops
