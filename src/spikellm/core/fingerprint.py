"""Fingerprints of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, to tell whether two runs saw the same."""
    return hashlib.sha256(
        tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    ).hexdigest()
