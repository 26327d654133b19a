"""Text generation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spikellm.core.errors import NumericalError, RequestError
from spikellm.data.tokens import require_known
from spikellm.models.families import longest_window
from spikellm.models.prepare import evaluating

_COLDEST = 1e-3  # logits divided by less could overflow


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Of the model's own ``generation_config`` only the special tokens are used; penalties, beams and
    limits on the choice of tokens are ignored.

    Args:
        temperature: 0 for greedy decoding; above 0 tokens are sampled from the whole distribution,
            and the same seed gives the same text.

    Returns:
        The prompt with its continuation.

    Raises:
        RequestError: an empty prompt, a temperature that is negative or next to 0, more tokens than
            the model can attend to, or the tokenizer of another model.
        NumericalError: the model gives NaN or infinity.
    """
    if not (temperature == 0 or _COLDEST <= temperature < math.inf) or max_new_tokens < 1:
        raise RequestError(
            f"temperature is {temperature} and max_new_tokens {max_new_tokens}; expected 0 or a"
            f" finite number from {_COLDEST} up, and at least 1"
        )
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed is {seed}; expected 0 to 2**63 - 1")
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if tokens.shape[1] == 0:
        raise RequestError("the prompt is empty; give at least one word")
    require_known(tokens, model)
    longest = longest_window(model.config)
    if longest is not None and tokens.shape[1] + max_new_tokens > longest:
        raise RequestError(
            f"{tokens.shape[1]} tokens of prompt and {max_new_tokens} new ones exceed the model's"
            f" maximum of {longest}; ask for {max(0, longest - tokens.shape[1])} at most"
        )
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    padding = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    with torch.no_grad(), evaluating(model), _plain_choice(model):
        output = model.generate(
            tokens.to(device),
            attention_mask=torch.ones_like(tokens).to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            logits_processor=[_require_finite],
            **sampling,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _require_finite(tokens: Tensor, scores: Tensor) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError(
            "the model gives NaN or infinity on this prompt; its weights are damaged or its number"
            " type overflows"
        )
    return scores


@contextmanager
def _plain_choice(model: Any) -> Iterator[None]:
    """Within this context ``generation_config`` has no say in how tokens are chosen."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own
