"""Predictions of the next token, some tokens at a time: the logits of a window take tokens times
vocabulary numbers, several times over where a loss is computed.

The decoder runs once; output projection, and whatever a family does to its logits, run on what the
decoder gave, piece by piece.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.nn.hooks import first_output, replaced_forward

_NUMBERS = 1 << 25  # logits at a time
LOGIT_BYTES = 14 * _NUMBERS
"""Memory of a loss and its gradient: logits in a short type, in float32, their logarithms, and the
gradient.
"""


def piecewise_outputs(model: Any, batch: Tensor, **keywords: Any) -> Iterator[tuple[int, Any]]:
    """Outputs of a model on some windows, as many tokens at a time as memory should hold.

    Args:
        batch: tokens, ``(windows, tokens)``.
        keywords: of the model's forward pass.

    Yields:
        ``(first, output)``: the first token of the piece in its window, and the model's output,
        whose logits are ``(windows, tokens of the piece, vocabulary)``.
    """
    pieces = _pieces(model, batch)
    if len(pieces) == 1:
        yield 0, model(batch, **keywords)
        return
    decoder = model.base_model
    states = _decoder_output(model, decoder, batch, keywords)
    with replaced_forward([decoder], lambda _: lambda *_, **__: states):
        for piece in pieces:
            yield int(piece[0]), model(batch, logits_to_keep=piece, **keywords)


def summed_loss(model: Any, batch: Tensor) -> float:
    """Sum of the next-token losses of some windows ``(windows, tokens)``, in nats."""
    total = 0.0
    for first, output in piecewise_outputs(model, batch, use_cache=False):
        total += float(_loss(output.logits, batch, first))
    return total


def loss_backward(model: Any, batch: Tensor) -> None:
    """Backward pass of the summed next-token loss of some windows ``(windows, tokens)``."""
    piecewise_backward(model, batch, lambda logits, first: _loss(logits, batch, first))


def piecewise_backward(model: Any, batch: Tensor, loss: Callable[[Tensor, int], Tensor]) -> float:
    """Backward pass of a loss that is summed over tokens, as many at a time as memory should hold;
    gives the loss.

    Args:
        batch: tokens, ``(windows, tokens)``.
        loss: of the logits of a piece, ``(windows, tokens of the piece, vocabulary)``, and its
            first token; asked for the pieces in order.
    """
    pieces = _pieces(model, batch)
    if len(pieces) == 1:
        whole = loss(model(batch, use_cache=False).logits, 0)
        whole.backward()
        return float(whole.detach())
    decoder, total = model.base_model, 0.0
    output = _decoder_output(model, decoder, batch, {"use_cache": False})
    states = output.last_hidden_state
    output.last_hidden_state = states.detach().requires_grad_()
    with replaced_forward([decoder], lambda _: lambda *_, **__: output):
        for piece in pieces:
            logits = model(batch, use_cache=False, logits_to_keep=piece).logits
            part = loss(logits, int(piece[0]))
            part.backward()
            total += float(part.detach())
    states.backward(output.last_hidden_state.grad)
    return total


def tokens_at_a_time(model: Any) -> int:
    """How many tokens' logits memory should hold at a time."""
    return max(1, _NUMBERS // int(model.config.get_text_config().vocab_size))


def _loss(logits: Tensor, batch: Tensor, first: int) -> Tensor:
    """Summed loss of a piece: what its tokens predict, but for the last of a window."""
    targets = batch[:, first + 1 : first + 1 + logits.shape[1]]
    logits = logits[:, : targets.shape[1]].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _pieces(model: Any, batch: Tensor) -> tuple[Tensor, ...]:
    """Places of tokens in their windows, piece by piece; one piece where all fit at once, or the
    family cannot give fewer.
    """
    windows, tokens = batch.shape
    places = torch.arange(tokens, device=batch.device)
    most = max(1, tokens_at_a_time(model) // windows)
    if (
        tokens <= most
        or model.base_model is model
        or "logits_to_keep" not in inspect.signature(model.forward).parameters
    ):
        return (places,)
    return tuple(places.split(most))


def _decoder_output(model: Any, decoder: nn.Module, batch: Tensor, keywords: dict[str, Any]) -> Any:
    """What the decoder gives where the model calls it."""
    return first_output(decoder, lambda: model(batch, logits_to_keep=1, **keywords))
