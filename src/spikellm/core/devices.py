"""Devices by name."""

from __future__ import annotations

import torch

from spikellm.core.errors import RequestError


def find_device(name: str | torch.device) -> torch.device:
    """A device that exists and can hold a tensor.

    Raises:
        RequestError: there is no such device, or it holds no values.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise ValueError("it holds no values")
    except Exception as error:  # each backend raises its own kind
        reason = " ".join(str(error).split())[:120]
        raise RequestError(
            f"device {str(name)!r} is not available here ({reason}); give cpu, or cuda:0 where"
            " there is one"
        ) from None
    return device
