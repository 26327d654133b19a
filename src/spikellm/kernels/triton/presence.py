"""Whether Triton can run here."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


def interpreting() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU: to test them without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def problem() -> str | None:
    """Why there is no Triton here; None if there is."""
    if find_spec("triton") is None:
        return "triton is not installed; it comes with torch on CUDA, or: pip install spikellm[gpu]"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None
