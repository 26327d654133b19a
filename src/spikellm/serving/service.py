"""The model behind the server: requests become generations within the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spikellm.data.tokens import known_tokens
from spikellm.models.families import longest_window
from spikellm.serving.engine import Engine
from spikellm.serving.generation import Asked
from spikellm.serving.protocol import BadRequestError, ChatRequest, CompletionRequest, Request


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """What a request may ask for.

    Attributes:
        prompt: tokens; what the model can attend to if None.
        new: tokens.
    """

    prompt: int | None = None
    new: int = 1024


class Service:
    """What is served.

    Args:
        name: that requests give as ``model``.
        template: of chats, in the place of the tokenizer's own.
    """

    def __init__(
        self, name: str, engine: Engine, tokenizer: Any, limits: TokenLimits, template: str | None
    ) -> None:
        self.name, self.engine, self.tokenizer, self.limits = name, engine, tokenizer, limits
        self._template = template
        model = engine.model
        self._longest = longest_window(model.config)
        self._vocabulary = known_tokens(model)
        self._outputs = int(model.config.get_text_config().vocab_size)
        self._ends = _ends(model, tokenizer)
        self._turn_ends = frozenset() if not self.chats else _turn_ends(tokenizer, template)

    @property
    def chats(self) -> bool:
        """Whether there is a template for chats."""
        return bool(self._template or getattr(self.tokenizer, "chat_template", None))

    def require_name(self, request: Request) -> None:
        """Refuse another model.

        Raises:
            BadRequestError: it is not the one that is served.
        """
        if request.model != self.name:
            raise BadRequestError(
                f"model {request.model!r} is not served here; expected {self.name!r}",
                "model",
                404,
                "model_not_found",
            )

    def completions(self, request: CompletionRequest) -> list[Asked]:
        """What a request for completions asks for, choice by choice.

        Raises:
            BadRequestError: see :meth:`_asked`, or more choices than are ever taken on at once.
        """
        self._require_few(len(request.prompts) * request.choices)
        found = []
        for prompt in request.prompts:
            tokens = self._tokens(prompt) if isinstance(prompt, str) else self._known(prompt)
            most = 16 if request.max_tokens is None else request.max_tokens
            found += self._asked(request, tokens, most, self._ends, echo=bool(request.echo))
        return found

    def chat(self, request: ChatRequest) -> list[Asked]:
        """What a request for an answer in a chat asks for, choice by choice.

        Raises:
            BadRequestError: there is no template, or it refuses the messages.
        """
        if not self.chats:
            raise BadRequestError(
                "the model has no chat template; ask /v1/completions, or start the server with"
                " --chat-template FILE",
                "messages",
            )
        self._require_few(request.choices)
        try:
            text = self.tokenizer.apply_chat_template(
                [message.plain() for message in request.messages],
                add_generation_prompt=True,
                tokenize=False,
                chat_template=self._template,
            )
        except Exception as error:  # a template raises whatever it likes
            raise BadRequestError(f"the chat template refuses this: {error}", "messages") from None
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._asked(request, tokens, request.most, self._ends | self._turn_ends)

    def _require_few(self, count: int) -> None:
        most = self.engine.limits.most
        if count > most:
            raise BadRequestError(
                f"{count} answers are asked for, and this server takes on {most} at most", "n"
            )

    def _asked(
        self,
        request: ChatRequest | CompletionRequest,
        tokens: Sequence[int],
        most: int | None,
        ends: frozenset[int],
        *,
        echo: bool = False,
    ) -> list[Asked]:
        most = self._room(len(tokens), most)
        sampling = request.sampling(self._outputs)
        return [
            Asked(
                prompt=tokens,
                most=most,
                sampling=sampling,
                ends=frozenset() if request.ignore_eos else ends,
                stops=request.stops,
                logprobs=request.top,
                echo=echo,
                seed=None if request.seed is None else _seed(request.seed, index),
            )
            for index in range(request.choices)
        ]

    def _tokens(self, prompt: str) -> list[int]:
        if not prompt and self.tokenizer.bos_token_id is not None:
            return [int(self.tokenizer.bos_token_id)]
        return self._known(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _known(self, tokens: Sequence[int]) -> list[int]:
        if not tokens:
            raise BadRequestError("prompt is empty; expected text or tokens", "prompt")
        if strangers := [token for token in tokens if not 0 <= token < self._vocabulary]:
            raise BadRequestError(
                f"prompt: token {strangers[0]}; expected 0 to {self._vocabulary - 1}", "prompt"
            )
        return list(tokens)

    def _room(self, prompt: int, most: int | None) -> int:
        """New tokens that a prompt may have.

        Raises:
            BadRequestError: it is too long, or more is asked than there may be.
        """
        longest, limits = self._longest, self.limits
        for limit, why in ((limits.prompt, "this server takes"), (longest, "the model attends to")):
            if limit is not None and prompt > limit:
                raise BadRequestError(
                    f"the prompt has {prompt} tokens, and {why} {limit} at most",
                    code="context_length_exceeded",
                )
        if most is not None and most > limits.new:
            raise BadRequestError(
                f"{most} new tokens are asked for, and this server gives {limits.new} at most",
                "max_tokens",
            )
        room = limits.new if longest is None else min(limits.new, longest - prompt)
        if room < min(1, limits.new if most is None else most) or (most or 0) > room:
            raise BadRequestError(
                f"{prompt} tokens of prompt and {most or 1} new ones are more than the {longest}"
                " that the model attends to",
                code="context_length_exceeded",
            )
        return room if most is None else most


def _seed(seed: int, index: int) -> int:
    """A seed for each choice; that of the first is the request's own."""
    return (seed ^ (index * 0x9E3779B97F4A7C15)) % 2**63


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, as model and tokenizer say."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id]
    return frozenset(int(token) for token in found if token is not None)


def _turn_ends(tokenizer: Any, template: str | None) -> frozenset[int]:
    """The special token that a chat template puts behind an answer, where it puts one."""
    said = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    except Exception:  # a template for chats of another kind
        return frozenset()
    behind = text.rpartition(said)[2]
    tokens = tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return frozenset(tokens[:1]) & special
