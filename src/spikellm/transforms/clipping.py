"""Learnable weight clipping (LWC, OmniQuant): two logits for each row and group narrow the range
that weights are coded in.

high = sigmoid(γ)·max(w),   low = sigmoid(β)·min(w)

The range and its gradients are in :mod:`spikellm.quantization.ste`.
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_LOGIT = 4.0


def initial_logits(
    rows: int, groups: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """γ and β at their start, ``(rows, groups)`` each: 98% of the range."""
    start = torch.full((rows, groups), INITIAL_LOGIT, device=device)
    return start, start.clone()
