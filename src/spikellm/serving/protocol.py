"""Requests of the OpenAI protocol. A field that would have no effect here is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from spikellm.serving.sampling import Sampling

_MOST_CHOICES, _MOST_TOP, _MOST_STOPS = 16, 20, 4
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "parallel_tool_calls": (None, True, False),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "store": (None, False),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
}
"""Fields of the protocol that there is nothing for here, and the values that ask for nothing."""
_NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that only say something of the sender."""
_EMPTY = ("refusal", "tool_calls", "function_call", "audio", "annotations")
"""Fields of a message that may be there, and empty."""


class BadRequestError(Exception):
    """A request that cannot be served as it is.

    Attributes:
        field: which of its fields is at fault.
        status: of the answer.
    """

    def __init__(
        self, message: str, field: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(BaseModel):
    """What both kinds of requests have in common.

    Attributes:
        top_k, ignore_eos: not of the protocol: sample from so many tokens; go on behind the end.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("expected an object")
        for name, neutral in _NEUTRAL.items():
            if name in given and given[name] not in neutral:
                raise ValueError(f"{name} is not supported here; leave it out")
        return {
            key: value
            for key, value in given.items()
            if key not in _NOTES and (key not in _NEUTRAL or key in cls.model_fields)
        }

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer.

        Raises:
            BadRequestError: too many, or an empty one.
        """
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > _MOST_STOPS or "" in found:
            raise BadRequestError(f"stop: expected up to {_MOST_STOPS} texts, none empty", "stop")
        return found

    def sampling(self, vocabulary: int) -> Sampling:
        """How tokens are chosen.

        Raises:
            BadRequestError: a bias of a token that does not exist.
        """
        bias = self.logit_bias or {}
        if strangers := [token for token in bias if not 0 <= token < vocabulary]:
            raise BadRequestError(
                f"logit_bias: token {strangers[0]}; expected 0 to {vocabulary - 1}", "logit_bias"
            )
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            bias=bias,
        )


def _prompts(given: Any) -> list[str | list[int]]:
    """Prompts as a list, texts or tokens; fails at the first that is neither."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise ValueError("expected a text, texts, tokens, or lists of tokens")
    if not given:
        raise ValueError("prompt is empty; expected text or tokens")
    prompts = [given] if type(given[0]) is int else given
    for prompt in prompts:
        tokens = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not (isinstance(prompt, str) or tokens):
            raise ValueError("expected a text, texts, tokens, or lists of tokens")
    return list(prompts)


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, texts or tokens."""
        found: list[str | list[int]] = self.prompt
        return found

    @property
    def top(self) -> int | None:
        """Rivals of each token whose logarithm is wanted."""
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_answered(cls, given: Any) -> Any:
        """A message of an earlier answer has fields that say nothing."""
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if k not in _EMPTY or v not in (None, [], "")}

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        named = {} if self.name is None else {"name": self.name}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, **named}


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None

    @property
    def top(self) -> int | None:
        """Rivals of each token whose logarithm is wanted.

        Raises:
            BadRequestError: rivals without logarithms.
        """
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs has no effect without logprobs", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """New tokens at most, if it says so."""
        if self.max_completion_tokens is None:
            return self.max_tokens
        return self.max_completion_tokens


R = TypeVar("R", bound=Request)


def read_request(kind: type[R], body: bytes) -> R:
    """A request from its bytes.

    Raises:
        BadRequestError: no JSON, a field that is missing, unknown or out of range, text that is
            none.
    """
    try:
        data = json.loads(body.decode("utf-8"))
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a character is no text
        return kind.model_validate(data)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise BadRequestError(f"the body is no JSON: {error}") from None
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in found["loc"])
        words = found["msg"].removeprefix("Value error, ")
        raise BadRequestError(f"{place}: {words}" if place else words, place or None) from None
