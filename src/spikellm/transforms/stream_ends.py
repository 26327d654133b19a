"""What lies around the blocks on a rotated residual stream: embeddings, last norm and output
projection, rotated some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.core.errors import UnsupportedModelError
from spikellm.core.offload import offload
from spikellm.models.families import Blocks, weight_and_bias
from spikellm.models.plan import output_head
from spikellm.models.swap import replace_module, with_parameters
from spikellm.nn.hooks import replaced_forward
from spikellm.transforms.base import ModelState
from spikellm.transforms.fusion import (
    OFFSETS,
    TOLERANCE,
    Fusion,
    Turn,
    readers_of_norms,
    rotate_stream,
)

LEAVE_OUT = "leave residual-rotation out of the recipe"

_COARSE = 5e-2  # tolerance where logits are compared in a short type, the model's own
_TOKENS = 16  # on which logits are compared
_ROWS = 4096  # of an embedding or projection at a time


def rotate_embeddings_and_head(state: ModelState, rotate: Turn) -> None:
    """Rotate embeddings, last norm and output projection.

    Embeddings that are shared with the projection are parted from it.

    Raises:
        UnsupportedModelError: the family has more around its blocks than embeddings, a norm and a
            projection.
    """
    model = state.model
    tokens = state.tokens[:, :_TOKENS].to(next(model.parameters()).device)
    norm, head = _last_norm_and_head(state, tokens)
    expected = _logits_without_blocks(model, state.blocks, tokens)
    _rotate_embeddings(state, rotate)
    tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else _COARSE
    vectors = {
        name: parameter.detach().clone()
        for name, parameter in model.get_submodule(norm).named_parameters()
    }
    projection, errors = model.get_submodule(head), list[float]()
    for offset in OFFSETS:
        layer, changed = _rotated_head(model.get_submodule(norm), projection, rotate, offset)
        replace_module(model, head, layer)
        for name, value in changed.items():
            model.get_submodule(norm).get_parameter(name).data.copy_(value)
        found = _logits_without_blocks(model, state.blocks, tokens)
        errors.append(float((found - expected).norm() / expected.norm()))
        if errors[-1] <= tolerance:
            return
        replace_module(model, head, projection)
        for name, value in vectors.items():
            model.get_submodule(norm).get_parameter(name).data.copy_(value)
    raise UnsupportedModelError(
        f"with a rotated residual stream the embeddings and the output projection of"
        f" {type(model).__name__} do not give what they gave (relative difference"
        f" {min(errors):.2g}); {LEAVE_OUT}"
    )


def _rotated_head(
    norm: nn.Module, head: nn.Module, rotate: Turn, offset: float
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The output projection behind a norm, both on a rotated stream, and what becomes of the norm's
    parameters. Some rows at a time: in float64 a large vocabulary would take several times the
    model's memory.
    """
    weight, bias = weight_and_bias(head)
    values = {"weight": torch.empty_like(weight, memory_format=torch.contiguous_format)}
    if bias is not None:
        values["bias"] = torch.empty_like(bias)
    changed: dict[str, Tensor] = {}
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        part = nn.Module()
        part.norm, part.head = norm, nn.Linear(1, 1, bias=bias is not None, device="meta")
        part.head.weight = nn.Parameter(weight[rows].detach(), requires_grad=False)
        if bias is not None:
            part.head.bias = nn.Parameter(bias[rows].detach(), requires_grad=False)
        fusion = Fusion(part)
        rotate_stream(fusion, {"norm": ("head",)}, (), rotate, offset)
        for name, value in fusion.linear("head").named_parameters():
            values[name][rows] = value
        changed = {name.removeprefix("norm."): value for name, value in fusion.vectors.items()}
    offload(weight)
    if type(head) is not nn.Linear:
        values["weight"] = values["weight"].T.contiguous()
    return with_parameters(head, values), changed


def _last_norm_and_head(state: ModelState, tokens: Tensor) -> tuple[str, str]:
    """Names of the output projection, and of the norm that it alone reads."""
    model, head = state.model, output_head(state.model)
    width = model.get_input_embeddings().weight.shape[1]
    with _without(state.blocks):
        seen = readers_of_norms(model, lambda: model(tokens, use_cache=False), width)
    found = {
        norm: names
        for norm, names in seen.items()
        if not norm.startswith(f"{state.blocks.name}.") and head in names
    }
    if head is None or list(found.values()) != [(head,)]:
        raise UnsupportedModelError(
            f"the output projection of {type(model).__name__} does not read a norm of the residual"
            f" stream, so the stream cannot be rotated; {LEAVE_OUT}"
        )
    return next(iter(found)), head


def _rotate_embeddings(state: ModelState, rotate: Turn) -> None:
    """Every embedding outside the blocks that is as wide as the stream."""
    width = state.model.get_input_embeddings().weight.shape[1]
    for name, module in state.model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and module.embedding_dim == width
            and not name.startswith(f"{state.blocks.name}.")
        ):
            old = module.weight.detach()
            new = torch.empty_like(old)
            for rows, part in zip(new.split(_ROWS), old.split(_ROWS), strict=True):
                rows.copy_(rotate(part.double()))
            module.weight = nn.Parameter(new, requires_grad=False)
            offload(old)
    state.model.config.tie_word_embeddings = False


def _logits_without_blocks(model: Any, blocks: Blocks, tokens: Tensor) -> Tensor:
    """What the model gives if its blocks do nothing, float32."""
    with _without(blocks):
        logits: Tensor = model(tokens, use_cache=False).logits.float()
    return logits


@contextmanager
def _without(blocks: Blocks) -> Iterator[None]:
    """While this holds, blocks pass on what they are fed."""
    seen: list[Any] = []  # what a block of this family returns beside its states

    def passing(real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            if not seen:
                seen.append(real(*arguments, **keywords))
            return (hidden, *seen[0][1:]) if isinstance(seen[0], (tuple, list)) else hidden

        return forward

    with replaced_forward(blocks.modules, passing):
        yield
