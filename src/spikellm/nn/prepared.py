"""Modules that prepare state from their buffers at first use, for kernels above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound="PreparedModule")


class PreparedModule(nn.Module):
    """A module whose prepared state dies with what it was made from.

    It dies with loading, moving, casting, any assignment to a buffer or to one of ``watched``, and
    any operation that writes into one of them in place. Whoever writes past torch's count of such
    operations (through ``.data``, into ``_buffers``, or into tensors made in inference mode) calls
    :meth:`forget`. Copies prepare their own. float32 buffers stay float32 when a model is cast:
    casting must not change what codes mean.

    Attributes:
        prepared: attributes that hold prepared state; None where there is none.
        watched: other attributes that it is made from.
    """

    forgotten: ClassVar[int] = 0  # how often any module was let go of what it had prepared
    prepared: ClassVar[tuple[str, ...]]
    _sources: tuple[Tensor, ...]  # whose count of writes in place is kept
    _writes: int  # of all of them, before anything was prepared
    watched: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Let everything be prepared anew at its next use."""
        self.__dict__.update(self._nothing())
        PreparedModule.forgotten += 1

    def written(self) -> bool:
        """Whether an operation wrote into what was prepared from, in place.

        Asked before every use of what is prepared, so it takes well under a microsecond.
        """
        if torch.compiler.is_compiling():
            return False
        writes = 0
        for source in self._sources:
            writes += source._version
        return writes != self._writes

    def forget_if_written(self) -> None:
        """:meth:`forget` where :meth:`written`."""
        if self.written():
            self.forget()

    def register_buffer(self, name: str, *arguments: Any, **keywords: Any) -> None:
        super().register_buffer(name, *arguments, **keywords)
        self.forget()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self.forget()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.watched or name in self.__dict__.get("_buffers", ()):
            self.forget()
        elif name in self.prepared and not self._sources:
            own = [*self._buffers.values(), *map(self._parameters.get, self.watched)]
            counted = [one for one in own if one is not None and not one.is_inference()]
            self._sources, self._writes = tuple(counted), sum(one._version for one in counted)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self._nothing()}

    def _nothing(self) -> dict[str, Any]:
        """Attributes while nothing is prepared."""
        return {**dict.fromkeys(self.prepared), "_sources": (), "_writes": 0}

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        exact = {name: one for name, one in self._buffers.items() if _is_float(one)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self.forget()
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.forget()


def _is_float(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point()
