"""One pass of a model as the library computes it, with everything that goes into and comes out of
its parts: what a native step is described from, and compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.models.families import decoder_of, find_blocks
from spikellm.nn.hooks import replaced_forward


@dataclass
class AttentionCall:
    """What the attention interface was called with: ``(batch, heads, tokens, channels)`` each; K
    and V of all tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float
    sinks: bool


@dataclass
class Captured:
    """Of one pass.

    Attributes:
        given: inputs of the blocks, then the output of the last, ``(batch, tokens, columns)``.
        embeddings: cosine and sine that each block was given; None where it was given none.
        attention: by attention module.
        inputs, outputs: of each linear layer, ``(batch, tokens, channels)``, by layer.
        hidden: what the output projection was given.
        projected: what it gave.
        output: of the model.
    """

    given: list[Tensor] = field(default_factory=list)
    embeddings: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    attention: dict[nn.Module, AttentionCall] = field(default_factory=dict)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    projected: Tensor | None = None
    output: Any = None


@torch.no_grad()
def capture(model: Any, run: Callable[[], Any], layers: set[nn.Module]) -> Captured:
    """Run a pass and keep what :class:`Captured` says of ``layers`` and everything else."""
    found = Captured()
    with ExitStack() as stack:
        for block in find_blocks(model).modules:
            hook = block.register_forward_pre_hook(_note_block(found), with_kwargs=True)
            stack.callback(hook.remove)
        hook = block.register_forward_hook(lambda _, __, out: found.given.append(_first(out)))
        stack.callback(hook.remove)
        for layer in layers:
            hook = layer.register_forward_hook(_note_layer(found))
            stack.callback(hook.remove)
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(_note_head(found))
        stack.callback(hook.remove)
        stack.enter_context(_watching(decoder_of(model), found))
        found.output = run()
    return found


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _note_block(found: Captured) -> Callable[..., None]:
    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = arguments[0] if arguments else keywords["hidden_states"]
        found.given.append(given.clone())
        pair = keywords.get("position_embeddings")
        found.embeddings.append(pair if isinstance(pair, tuple) and len(pair) == 2 else None)

    return note


def _note_layer(found: Captured) -> Callable[..., None]:
    def note(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        found.inputs[module] = arguments[0].detach().clone()
        found.outputs[module] = output.detach().clone()

    return note


def _note_head(found: Captured) -> Callable[..., None]:
    def note(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        found.hidden, found.projected = arguments[0].clone(), output.clone()

    return note


@contextmanager
def _watching(decoder: Any, found: Captured) -> Iterator[None]:
    """See the arguments of the attention interface, whichever function is behind it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = str(decoder.config._attn_implementation)
    if name not in ALL_ATTENTION_FUNCTIONS:
        yield
        return
    before = ALL_ATTENTION_FUNCTIONS[name]

    def watched(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *more: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        **keywords: Any,
    ) -> Any:
        by = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = keywords.get("s_aux") is not None or keywords.get("position_bias") is not None
        found.attention[module] = AttentionCall(
            query.clone(), key, value, float(by), float(softcap or 0.0), sinks
        )
        return before(
            module, query, key, value, *more, scaling=scaling, softcap=softcap, **keywords
        )

    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = before


@torch.no_grad()
def position_embeddings(model: Any, positions: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    """Cosine and sine, ``(1, tokens, channels)`` each, that the decoder gives each of its blocks at
    some positions ``(1, tokens)``; the blocks do not run.
    """
    found = Captured()
    decoder = decoder_of(model)
    note = _note_block(found)

    def skip(_: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            note(decoder, arguments, keywords)
            return arguments[0] if arguments else keywords["hidden_states"]

        return forward

    tokens = torch.zeros_like(positions)
    with replaced_forward(find_blocks(model).modules, skip):
        decoder(input_ids=tokens, position_ids=positions, use_cache=False)
    return found.embeddings
