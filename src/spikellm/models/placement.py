"""A part of a model on another device for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Tensors(NamedTuple):
    """What a module itself held, and the values of its parameters."""

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    values: dict[str, Tensor]


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module on a device, and put it back where it was.

    What was taken out of it meanwhile gets the tensors that it had, so that it holds nothing on the
    device; after an error all of its modules do, and what was put into it stays where it is.
    """
    home = next(module.parameters()).device
    if home == device:
        yield
        return
    before = {part: _tensors_of(part) for part in module.modules()}
    try:
        module.to(device)
        yield
        module.to(home)
        staying = set(module.modules())
    except BaseException:
        staying = set()
        raise
    finally:
        for part, tensors in before.items():
            if part not in staying:
                _give_back(part, tensors)


def _tensors_of(part: nn.Module) -> _Tensors:
    values = {name: one.data for name, one in part._parameters.items() if one is not None}
    return _Tensors(dict(part._parameters), dict(part._buffers), values)


def _give_back(part: nn.Module, tensors: _Tensors) -> None:
    for name, value in tensors.values.items():
        parameter = tensors.parameters[name]
        assert parameter is not None
        parameter.data = value
    part._parameters.update(tensors.parameters)
    part._buffers.update(tensors.buffers)
