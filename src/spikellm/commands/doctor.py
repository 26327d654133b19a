"""The verb ``doctor``: what this machine offers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from spikellm.commands.support.verb import verbs
from spikellm.core import console

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "datasets", "pydantic")


@verbs.register("doctor")
def doctor() -> dict[str, Any]:
    """Show versions, processor features and the kernels in use.

    Returns:
        Findings by name, in the order in which they are worth reading.
    """
    import torch

    from spikellm.core.registry import plugins
    from spikellm.core.version import __version__
    from spikellm.kernels import choice, describe
    from spikellm.kernels.base import backends, in_order
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
    native = backends["native"].missing() or (choice() == "torch" and "SPIKELLM_KERNELS is torch")
    found["decoder step"] = (
        f"the model library's ({native})" if native else "native where it agrees with the library's"
    )
    for plugin in plugins():
        found[f"plugin, {plugin.name}"] = plugin.problem or f"loaded from {plugin.origin}"
    found["kernels asked for"] = choice()
    found["compiler"] = build.compiler() or "none"
    found["kernel cache"] = str(build.cache_folder())
    return found


def show(result: dict[str, Any]) -> None:
    """Print what was found."""
    rows = [[key, str(value)] for key, value in result.items()]
    console.table("spikellm doctor", ["what", "found"], rows, left=2)


def _devices(backend: Any) -> str:
    return "every device" if backend.devices is None else ", ".join(sorted(backend.devices))
