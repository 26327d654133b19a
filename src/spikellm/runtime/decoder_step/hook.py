"""How a model comes to use its native step: its forward pass looks at each call, and runs the step
where the call asks for nothing else.
"""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from spikellm.models.attention_interface import observed, spiking_attentions
from spikellm.models.few_queries import use_few_queries
from spikellm.models.growing_cache import make_growing, whole_or_not
from spikellm.runtime.decoder_step.check import Pass, checked_step
from spikellm.runtime.decoder_step.step import DecoderStep
from spikellm.runtime.decoder_step.watch import Watch, watched

MOST_QUERIES, MOST_TOKENS = 16, 64
_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "cache_position",
}
_STATE = "_spikellm_step"

_log = logging.getLogger("spikellm")


class StepState:
    """The native step of a model: not looked for yet, taken, or refused for a reason."""

    def __init__(self) -> None:
        self.step: DecoderStep | None = None
        self.reason: str | None = None
        self.watch: Watch | None = None
        self.expected: tuple[int, int] = (0, 0)  # cache, and its tokens when a generation goes on

    def forget_if_changed(self, *, continues: bool) -> None:
        """Look for a step anew where the model is not what it was."""
        if self.watch is not None and not self.watch.unchanged(continues=continues):
            self.step, self.reason, self.watch = None, None, None

    def __deepcopy__(self, _: Any) -> StepState:
        return StepState()

    def __reduce__(self) -> tuple[type[StepState], tuple[()]]:
        return StepState, ()


def use_step(model: Any) -> None:
    """Let a converted model decode in native steps where it can."""
    if _STATE in model.__dict__:
        return
    model.__dict__[_STATE] = StepState()
    if not spiking_attentions(model):
        use_few_queries(model)
    model.forward = types.MethodType(_forward_of(type(model)), model)


def step_state(model: Any) -> StepState | None:
    """How a model decodes; None of one that was never asked to."""
    found: StepState | None = model.__dict__.get(_STATE)
    return found


def _forward_of(kind: type) -> Callable[..., Any]:
    original = kind.forward  # type: ignore[attr-defined]

    @wraps(original)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        def library() -> Any:
            with whole_or_not(keywords.get("past_key_values")):
                return original(self, *arguments, **keywords)

        if len(arguments) == 1 and "input_ids" not in keywords:
            asked: dict[str, Any] | None = {"input_ids": arguments[0], **keywords}
        else:
            asked = None if arguments else keywords
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if asked is None or plain or not _asks_for_step(self, asked):
            return library()
        return _step_or(library, self, asked)

    return forward


def _asks_for_step(model: Any, asked: dict[str, Any]) -> bool:
    """Whether a call is of a few tokens to a filled cache, and wants logits alone."""
    tokens, cache = asked.get("input_ids"), asked.get("past_key_values")
    if tokens is None or not isinstance(cache, Cache) or tokens.shape[1] > MOST_QUERIES:
        return False
    if tokens.numel() > MOST_TOKENS or model.training or cache.get_seq_length() == 0:
        return False
    if any(
        one is not None and one is not False for name, one in asked.items() if name not in _KNOWN
    ):
        return False
    return (
        asked.get("use_cache") is not False
        and asked.get("return_dict") is not False
        and isinstance(asked.get("logits_to_keep", 0), int)
    )


def _step_or(library: Callable[[], Any], model: Any, asked: dict[str, Any]) -> Any:
    """A native step, or the library's pass where there is none."""
    state: StepState = model.__dict__[_STATE]
    now = (id(asked["past_key_values"]), asked["past_key_values"].get_seq_length())
    continues, state.expected = (
        now == state.expected,
        (now[0], now[1] + asked["input_ids"].shape[1]),
    )
    if continues and state.reason is not None:
        return library()
    state.forget_if_changed(continues=continues)
    if state.reason is not None or observed():
        return library()
    given = _pass_of(asked)
    if given is None or make_growing(given.cache) is not None:
        return library()
    if state.step is None:
        state.watch, state.reason = watched(model)
        if state.reason is not None:
            return library()
        found, output = checked_step(model, given, library)
        if isinstance(found, DecoderStep):
            state.step = found
        else:
            state.reason = found
            _log.info("spikellm: no native decoder step: %s", found)
        state.watch = Watch(model)  # kernels were prepared meanwhile
        return output
    keep = asked.get("logits_to_keep") or 0
    logits = state.step.run(given.tokens, given.positions, given.mask, given.cache)
    if state.watch is not None:
        state.watch.finished = time.thread_time()
    return state.step.kind(
        logits=logits[:, -keep:] if keep else logits, past_key_values=given.cache
    )


def _pass_of(asked: dict[str, Any]) -> Pass | None:
    """The pass that a call asks for; None where its mask or positions are of no known kind."""
    tokens, cache = asked["input_ids"], asked["past_key_values"]
    mask, positions = asked.get("attention_mask"), asked.get("position_ids")
    past = cache.get_seq_length()
    if mask is not None:
        if type(mask) is not Tensor or mask.shape != (len(tokens), past + tokens.shape[1]):
            return None
        mask = None if bool(mask.all()) else mask.long().contiguous()
    if positions is None:
        if mask is not None:
            return None
        positions = torch.arange(past, past + tokens.shape[1])
    if positions.dim() > 2:
        return None
    positions = positions.expand(tokens.shape).contiguous()
    return Pass(tokens, positions, mask, cache)
