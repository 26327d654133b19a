"""Learnable weight clipping (LWC, OmniQuant): two logits for each row and group narrow the range that weights are coded in.

high = sigmoid(γ)·max(w),   low = sigmoid(β)·min(w)
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.quantization.affine import weight_range

INITIAL_LOGIT = 4.0


def initial_logits(rows: int, groups: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """γ and β at their start, ``(rows, groups)`` each: 98% of the range."""
    return tuple(torch.full((rows, groups), INITIAL_LOGIT, device=device) for _ in range(2))  # type: ignore[return-value]


def clipped_range(weight: Tensor, groups: list[tuple[int, int]], gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """``(low, high)`` of each row and group, ``(rows, groups)``; differentiable in the logits."""
    low, high = weight_range(weight, groups)
    return torch.sigmoid(beta) * low, torch.sigmoid(gamma) * high


def fake_code(weight: Tensor, bits: int, groups: list[tuple[int, int]], low: Tensor, high: Tensor, *, symmetric: bool = False) -> Tensor:
    """Values that the codes of a weight matrix stand for, with straight-through rounding: differentiable in the weight and the range.

    Equal to ``dequantize(code_in_range(…))`` of :mod:`spikellm.quantization.affine`.
    """
    parts = []
    top = 2**bits - 1
    for index, (start, stop) in enumerate(groups):
        w, lo, hi = weight[:, start:stop], low[:, index : index + 1], high[:, index : index + 1]
        if symmetric:
            middle = 2 ** (bits - 1)
            scale, zero = torch.maximum(hi, -lo) / (middle - 1), torch.full_like(lo, middle)
        else:
            scale = (hi / top - lo / top).clamp(min=torch.finfo(torch.float32).tiny)
            zero = (-lo / scale).detach()
        zero = torch.floor(zero + 0.5).clamp(0, top)
        code = (_round_through(w / scale.clamp(min=torch.finfo(torch.float32).tiny)) + zero).clamp(1 if symmetric else 0, top)
        parts.append((code - zero) * scale)
    return torch.cat(parts, dim=1)


def _round_through(value: Tensor) -> Tensor:
    return value + (torch.floor(value + 0.5) - value).detach()
