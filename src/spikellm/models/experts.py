"""Experts of mixture-of-experts layers, which the model library fuses into 3-D parameters, split
into one linear layer for each expert.

After :func:`unfuse_experts` an expert's matrices are ordinary ``nn.Linear`` layers that share the
storage of the fused parameter, so that every algorithm converts them like any other layer, and the
module computes through the library's experts interface. The router does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IMPLEMENTATION = "spike"
_PARTS = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}
_everywhere: ContextVar[bool] = ContextVar("spikellm_experts_everywhere", default=False)


class Fused(NamedTuple):
    """A module that was split, and the parameters that it had before."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]


@contextmanager
def every_expert_sees_every_token() -> Iterator[None]:
    """Within this context experts compute on all tokens, so that rarely used ones are observed too.

    Outputs do not change.
    """
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


def spike_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts function for the library's interface.

    Args:
        hidden_states: ``(tokens, channels)``.
        top_k_index, top_k_weights: experts of every token and their weights, ``(tokens, k)``; an
            index beyond the experts is skipped.

    Returns:
        ``(tokens, channels)``.
    """
    module_any: Any = module
    up, down = module_any.gate_up, module_any.down
    finish = module_any._apply_gate if module_any.has_gate else module_any.act_fn
    chosen = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
    everywhere = _everywhere.get()
    for expert in range(len(up)) if everywhere else top_k_index.unique().tolist():
        if not 0 <= expert < len(up):
            continue
        token, place = (top_k_index == expert).nonzero(as_tuple=True)
        output = down[expert](
            finish(up[expert](hidden_states if everywhere else hidden_states[token]))
        )
        if getattr(module, "has_post_expert_norm", False):
            output = module_any.post_expert_norm(output)
        chosen.index_put_(
            (token, place), (output[token] if everywhere else output).to(chosen.dtype)
        )
    return (chosen * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts in 3-D parameters and computes through the library's
    interface.
    """
    parameters = dict(module.named_parameters(recurse=False))
    fused = [name for name in _PARTS if name in parameters and parameters[name].dim() == 3]
    return hasattr(module, "is_transposed") and "down_proj" in fused and len(fused) == 2


def is_unfused(module: nn.Module) -> bool:
    """Whether a module's experts were split."""
    return isinstance(getattr(module, "gate_up", None), nn.ModuleList) and hasattr(
        module, "is_transposed"
    )


def routers_of(block: nn.Module) -> set[str]:
    """Names of the modules that route tokens to split experts or gate them, which are not
    converted.

    They are siblings of the experts: linear layers, and modules whose matrices all have one row for
    each expert.
    """
    found = set()
    for name, parent in block.named_modules():
        counts = [len(child.gate_up) for child in parent.children() if is_unfused(child)]
        for child, module in parent.named_children() if counts else ():
            matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
            routes = bool(matrices) and all(matrix.shape[0] == counts[0] for matrix in matrices)
            if not is_unfused(module) and (isinstance(module, nn.Linear) or routes):
                found.add(f"{name}.{child}" if name else child)
    return found


def unfuse_experts(model: Any) -> list[Fused]:
    """Split all experts of a model, on any device (meta too).

    A model without experts does not change.

    Returns:
        What :func:`fuse_again` needs to undo it.
    """
    found = [module for module in model.modules() if is_fused(module)]
    if not found:
        return []
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, spike_experts)
    taken = [_unfuse(module) for module in found]
    model.set_experts_implementation(IMPLEMENTATION)
    for module in found:
        module.config._experts_implementation = IMPLEMENTATION
    return taken


def fuse_again(model: Any, taken: list[Fused], implementation: str | None) -> None:
    """Undo :func:`unfuse_experts`."""
    for module, parameters in taken:
        del module.gate_up, module.down
        for name, parameter in parameters.items():
            module.register_parameter(name, parameter)
    if taken:
        model.set_experts_implementation(implementation)


def _unfuse(module: nn.Module) -> Fused:
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if name.removesuffix("_bias") in _PARTS
    }
    for name, part in _PARTS.items():
        if name in parameters:
            weight, bias = parameters[name].data, parameters.get(f"{name}_bias")
            matrices = weight.transpose(1, 2) if module.is_transposed else weight
            biases = [None] * len(matrices) if bias is None else list(bias.data)
            setattr(
                module,
                part,
                nn.ModuleList(_linear(*pair) for pair in zip(matrices, biases, strict=True)),
            )
    for name in parameters:
        delattr(module, name)
    module._is_hf_initialized = True  # type: ignore[assignment]  # its own initialisation would look for the fused parameters
    return Fused(module, parameters)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around existing storage."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
