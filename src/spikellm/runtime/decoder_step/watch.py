"""What a native step relies on staying as it was: modules, their hooks and their weights. Asked
before every step, so it takes a few dozen microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikellm.kernels import select
from spikellm.kernels.base import choice
from spikellm.models.attention_guard import before_attention, before_decoder
from spikellm.nn.linear import SpikingLinear

_OWN = {before_attention, before_decoder}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The state of a model when its step was made."""

    def __init__(self, model: nn.Module) -> None:
        self._empty: list[Any] = []
        self._children: list[tuple[dict[str, Any], int]] = []
        self._own: list[dict[str, Any]] = []
        self._few: list[tuple[dict[int, Any], int]] = []
        self._layers: list[tuple[SpikingLinear, Any]] = []
        self._counted: list[Tensor] = []
        for module in model.modules():
            self._own.append(module.__dict__)
            for name in _HOOKS:
                hooks = getattr(module, name)
                if hooks:
                    self._few.append((hooks, len(hooks)))
                else:
                    self._empty.append(hooks)
            if isinstance(module, SpikingLinear):
                self._layers.append((module, module._kernels))
            self._counted += [p for p in module._parameters.values() if p is not None]
            self._counted += [b for b in module._buffers.values() if b is not None]
            self._children.append((module._modules, _identity(module._modules)))
        self._counted = [one for one in self._counted if not one.is_inference()]
        self._writes = sum(one._version for one in self._counted)
        self._forward = [own.get("forward") for own in self._own]
        self._choice = choice()

    def unchanged(self) -> bool:
        """Whether everything is as it was."""
        if any(self._empty) or any(len(hooks) != count for hooks, count in self._few):
            return False
        if [own.get("forward") for own in self._own] != self._forward:
            return False
        if any(layer._kernels is not kernels for layer, kernels in self._layers):
            return False
        if any(_identity(children) != before for children, before in self._children):
            return False
        return sum([one._version for one in self._counted]) == self._writes


def _identity(children: dict[str, Any]) -> int:
    return hash(tuple(map(id, children.values())))


def watched(model: nn.Module) -> tuple[Watch | None, str | None]:
    """What to watch of a model, or why it must run as the library does."""
    if choice() == "torch":
        return None, "SPIKELLM_KERNELS is torch"
    for name, module in model.named_modules():
        for hooks in (getattr(module, kind) for kind in _HOOKS):
            if any(hook not in _OWN for hook in hooks.values()):
                return None, f"{name or 'the model'} has hooks"
        if module is not model and "forward" in module.__dict__:
            return None, f"{name} has a forward pass of its own"
        if isinstance(module, SpikingLinear):
            if module.execution_mode != "merged":
                return None, f"{name} runs in {module.execution_mode} execution"
            if select(module.spec(), module.weight_scale.device).name != "native":
                return None, f"{name} does not run on native kernels"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            return None, f"{name} is on {tensor.device}"
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return None, f"its numbers are {dtype}"
    return Watch(model), None
