"""What every launch of a kernel needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def current(x: Tensor) -> AbstractContextManager[object]:
    """While this holds, the device of a tensor is the one that kernels are launched on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
