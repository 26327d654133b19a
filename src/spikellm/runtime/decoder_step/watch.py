"""What a native step relies on staying as it was: modules, their hooks and their weights."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spikellm.kernels import select
from spikellm.kernels.base import choice
from spikellm.models.attention_guard import before_attention, before_decoder
from spikellm.models.cache import SpikingLayer, SpikingSlidingLayer
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.prepared import PreparedModule
from spikellm.nn.rotation import Rotation
from spikellm.nn.vocabulary import CodedHead, CodedTable

_METHODS = {
    (kind, name): getattr(kind, name)
    for kind, names in (
        (SpikingLinear, ("forward", "encode")),
        (Rotation, ("forward",)),
        (CodedHead, ("forward",)),
        (CodedTable, ("product",)),
        (SpikingAttention, ("code", "turned_key", "turned_query")),
        (HeadCoder, ("to_rows", "store", "fake_quantize")),
        (SpikingLayer, ("update",)),
        (SpikingSlidingLayer, ("update",)),
    )
    for name in names
}
"""What the module path calls, whose place somebody may have taken to look on."""
_OWN = {before_attention, before_decoder}
_VERSION, _FORWARD = attrgetter("_version"), methodcaller("get", "forward")
_PARTS = 16
_SOON = 0.005  # seconds of this thread after a step within which the next is of the same loop
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Part:
    """Some of a model's modules: their hooks, children, forward passes and tensors."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._hooks = [getattr(module, name) for module in modules for name in _HOOKS]
        self._children = [module._modules for module in modules if module._modules]
        self._own = [module.__dict__ for module in modules]
        self._layers = [one.__dict__ for one in modules if isinstance(one, SpikingLinear)]
        held = [one for m in modules for one in (*m._parameters.values(), *m._buffers.values())]
        self._counted = [one for one in held if one is not None and not one.is_inference()]
        self._tables = [one.__dict__ for one in modules if isinstance(one, CodedTable)]
        self._before = self._now()

    def unchanged(self) -> bool:
        return self._now() == self._before

    def _now(self) -> tuple[Any, ...]:
        return (
            sum(map(_VERSION, self._counted)),
            [own["_kernels"] for own in self._layers],
            [own["_product"] for own in self._tables],
            [[*children.values()] for children in self._children],
            [*map(_FORWARD, self._own)],
            [*map(len, self._hooks)],
        )


class Watch:
    """The state of a model when its step was made.

    All of it is looked at before the first step of a generation. Before later ones, which follow
    within a few milliseconds of their thread: whether any hook was registered, any kernel
    forgotten; and one part of the modules, each in turn, for the memory of all has to be fetched
    anew every time.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._parts = [_Part(modules[first::_PARTS]) for first in range(_PARTS)]
        self._turn, self._quick = 0, self._events()
        self.finished = 0.0

    def unchanged(self, *, continues: bool) -> bool:
        """Whether everything is as it was.

        Args:
            continues: this is the next token of a generation.
        """
        if replaced_method() is not None:
            return False
        events = self._events()
        if continues and events == self._quick and 0 <= time.thread_time() - self.finished < _SOON:
            self._turn = (self._turn + 1) % _PARTS
            return self._parts[self._turn].unchanged()
        self._quick = events
        return all(part.unchanged() for part in self._parts)

    @staticmethod
    def _events() -> tuple[int, int, str | None]:
        kernels = os.environ.get("SPIKELLM_KERNELS")
        return RemovableHandle.next_id, PreparedModule.forgotten, kernels


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
