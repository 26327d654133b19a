"""Rotations of inputs in one pass: signs, additions, offsets and conversions of type."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikellm.kernels.native import build
from spikellm.kernels.native.ops import TYPES, pointer, unless
from spikellm.quantization import hadamard


class NativeRotation:
    """``mix(x · signs) − offset`` of all channels, in float32; the same bits as in torch.

    Args:
        signs, offset: float32 ``(channels,)``; no offset where there is none.
    """

    dtypes = frozenset(TYPES)

    def __init__(self, signs: Tensor, offset: Tensor | None) -> None:
        self._run = build.load_library().spikellm_rotate
        self._signs = signs.contiguous()
        self._offset = None if offset is None else offset.contiguous()
        self._power = hadamard.largest_power(len(signs))
        self._second = hadamard.shapiro(self._power)

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., channels)``, float32 or bfloat16, in its own type."""
        x = x.contiguous()
        found, channels = torch.empty_like(x), len(self._signs)
        failed = self._run(
            x.data_ptr(),
            x.numel() // channels,
            channels,
            self._power,
            math.sqrt(self._power),
            self._second.data_ptr(),
            self._signs.data_ptr(),
            pointer(self._offset),
            found.data_ptr(),
            TYPES[x.dtype],
            torch.get_num_threads(),
        )
        return unless(failed, found)
