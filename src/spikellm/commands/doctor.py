"""What this machine offers: versions, processor features, kernels in use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "datasets", "pydantic")


def examine() -> dict[str, Any]:
    """Findings by name, in the order in which they are worth reading."""
    import torch

    from spikellm.core.version import __version__
    from spikellm.kernels import choice, describe
    from spikellm.kernels.base import in_order
    from spikellm.kernels.native import build

    found: dict[str, Any] = {
        "spikellm": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing; reinstall spikellm"
    found["processor"] = torch.backends.cpu.get_cpu_capability()
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    found["accelerator"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    found["kernels"] = describe()
    for backend in in_order():
        problem = backend.missing()
        found[f"kernels, {backend.name}"] = (
            f"off ({problem})" if problem else f"ready on {_devices(backend)}"
        )
    found["kernels asked for"] = choice()
    found["compiler"] = build.compiler() or "none"
    found["kernel cache"] = str(build.cache_folder())
    return found


def _devices(backend: Any) -> str:
    return "every device" if backend.devices is None else ", ".join(sorted(backend.devices))
