"""What a native step relies on staying as it was: modules, their hooks and their weights. Asked
before every step, so it takes a few dozen microseconds.
"""

from __future__ import annotations

import os
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikellm.kernels import select
from spikellm.kernels.base import choice
from spikellm.models.attention_guard import before_attention, before_decoder
from spikellm.models.cache import SpikingLayer, SpikingSlidingLayer
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.rotation import Rotation

_METHODS = {
    (kind, name): getattr(kind, name)
    for kind, names in (
        (SpikingLinear, ("forward", "encode")),
        (Rotation, ("forward",)),
        (SpikingAttention, ("code", "turned_key", "turned_query")),
        (HeadCoder, ("to_rows", "store", "fake_quantize")),
        (SpikingLayer, ("update",)),
        (SpikingSlidingLayer, ("update",)),
    )
    for name in names
}
"""What the module path calls, whose place somebody may have taken to look on."""
_OWN = {before_attention, before_decoder}
_VERSION, _HAS_FORWARD = attrgetter("_version"), methodcaller("__contains__", "forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The state of a model when its step was made.

    What kernels read is looked at before every step, and so are hooks, modules and forward passes;
    what kernels were prepared from, and forgot, before the first step of a generation.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks: list[dict[int, Any]] = []
        self._parents: list[dict[str, nn.Module | None]] = []
        self._own: list[dict[str, Any]] = []
        self._layers: list[dict[str, Any]] = []
        read: list[Tensor | None] = []
        counted: list[Tensor | None] = []
        for module in model.modules():
            self._hooks += [getattr(module, name) for name in _HOOKS]
            if module._modules:
                self._parents.append(module._modules)
            if module is not model:
                self._own.append(module.__dict__)
            if isinstance(module, SpikingLinear):
                self._layers.append(module.__dict__)
                kernels = module._kernels.chosen if module._kernels is not None else None
                pointed = {
                    one.data_ptr() for one in getattr(kernels, "operands", ()) if one is not None
                }
                held = [one for one in module.buffers(recurse=False) if one.data_ptr() in pointed]
                read += [*held, module.bias]
            else:
                read += module._parameters.values()
            counted += [*module._parameters.values(), *module._buffers.values()]
        self._read, self._counted = (
            [one for one in tensors if one is not None and not one.is_inference()]
            for tensors in (read, counted)
        )
        self._registered = RemovableHandle.next_id
        self._every, self._first = self._now(), self._all_writes()

    def unchanged(self, *, continues: bool) -> bool:
        """Whether everything is as it was.

        Args:
            continues: this is the next token of a generation.
        """
        if replaced_method() is not None or any(map(_HAS_FORWARD, self._own)):
            return False
        if RemovableHandle.next_id != self._registered:  # somebody hooked into some module
            if [len(hooks) for hooks in self._hooks] != self._first[1]:
                return False
            self._registered = RemovableHandle.next_id
        if self._now() != self._every:
            return False
        return continues or self._all_writes() == self._first

    def _now(self) -> tuple[Any, ...]:
        return (
            sum(map(_VERSION, self._read)),
            [own["_kernels"] for own in self._layers],
            [[*children.values()] for children in self._parents],
            os.environ.get("SPIKELLM_KERNELS"),
        )

    def _all_writes(self) -> tuple[int, list[int]]:
        return sum(map(_VERSION, self._counted)), [len(hooks) for hooks in self._hooks]


def replaced_method() -> str | None:
    """A method of this package that is not its own any more."""
    for (kind, name), own in _METHODS.items():
        if getattr(kind, name) is not own:
            return f"{kind.__name__}.{name}"
    return None


def watched(model: nn.Module) -> tuple[Watch, str | None]:
    """What to watch of a model, and why it must run as the library does, if it must."""
    return Watch(model), _reason(model)


def _reason(model: nn.Module) -> str | None:
    if choice() == "torch":
        return "SPIKELLM_KERNELS is torch"
    if (replaced := replaced_method()) is not None:
        return f"{replaced} was replaced"
    for name, module in model.named_modules():
        for hooks in (getattr(module, kind) for kind in _HOOKS):
            if any(hook not in _OWN for hook in hooks.values()):
                return f"{name or 'the model'} has hooks"
        if module is not model and "forward" in module.__dict__:
            return f"{name} has a forward pass of its own"
        if isinstance(module, SpikingLinear):
            if module.execution_mode != "merged":
                return f"{name} runs in {module.execution_mode} execution"
            if select(module.spec(), module.weight_scale.device).name != "native":
                return f"{name} does not run on native kernels"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}"
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its numbers are {dtype}"
    return None
