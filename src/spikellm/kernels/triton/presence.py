"""Whether Triton can run here."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

_LEAST = (8, 0)  # compute capability


def interpreting() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU: to test them without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def problem() -> str | None:
    """Why there is no Triton here; None if there is."""
    if find_spec("triton") is None:
        return "triton is not installed; it comes with torch on CUDA, or: pip install spikellm[gpu]"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    oldest = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if oldest < _LEAST:
        return f"a device has compute capability {oldest[0]}.{oldest[1]}; the kernels need 8.0"
    return None
