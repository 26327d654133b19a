"""Rotations ready for the Triton kernel."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from spikellm.kernels.triton.jit.mixing import walsh
from spikellm.kernels.triton.launch import current
from spikellm.quantization import hadamard

_LONG = 2048  # channels from which a program has more warps


def rotated(x: Tensor) -> Tensor:
    """:func:`spikellm.quantization.hadamard.mix`; the kernel takes float32."""
    if x.dtype != torch.float32:
        return hadamard.mix(x)
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    power = hadamard.largest_power(size)
    _transform(x, y, None, 0)
    if power != size:
        _transform(y, y, _signs(power, x.device), size - power)
    return y


@cache
def _signs(power: int, device: torch.device) -> Tensor:
    return hadamard.shapiro(power).to(device)


def _transform(x: Tensor, y: Tensor, signs: Tensor | None, offset: int) -> None:
    size = x.shape[-1]
    power, rows = hadamard.largest_power(size), x.numel() // size
    if rows:
        with current(x):
            walsh[(rows,)](
                *(x, y, signs, size, offset, math.sqrt(power)),
                SIGNED=signs is not None,
                POWER=power,
                STAGES=power.bit_length() - 1,
                num_warps=8 if power >= _LONG else 4,
                enable_fp_fusion=False,
            )
