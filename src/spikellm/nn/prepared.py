"""Modules that prepare state from their buffers at first use, for kernels above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound="PreparedModule")


class PreparedModule(nn.Module):
    """A module whose prepared state dies with what it was made from.

    It dies with loading, moving, casting, and any assignment to a buffer or to one of ``watched``;
    whoever writes into a buffer in another way calls :meth:`forget`. Copies prepare their own.
    float32 buffers stay float32 when a model is cast: casting must not change what codes mean.

    Attributes:
        prepared: attributes that hold prepared state; None where there is none.
        watched: other attributes that it is made from.
    """

    prepared: ClassVar[tuple[str, ...]]
    watched: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Let everything be prepared anew at its next use."""
        self.__dict__.update(dict.fromkeys(self.prepared))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.watched or name in self.__dict__.get("_buffers", ()):
            self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(self.prepared)}

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        exact = {name: one for name, one in self._buffers.items() if _is_float32(one)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != torch.float32:
                self._buffers[name] = before.to(after.device)
        self.forget()
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.forget()


def _is_float32(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.dtype == torch.float32
