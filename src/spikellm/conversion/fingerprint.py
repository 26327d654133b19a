"""What decides the bytes of a conversion: equal identities, equal bytes."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import torch
from torch import Tensor

from spikellm.core.fingerprint import fingerprint
from spikellm.core.offload import offload
from spikellm.core.version import __version__
from spikellm.recipe import Recipe


def identity_of(
    model: Any, windows: Tensor, recipe: Recipe, device: torch.device
) -> dict[str, Any]:
    """Recipe, fingerprints of the calibration windows and of the model, versions, kind of device.

    Plain data.
    """
    return {
        "recipe": recipe.model_dump(mode="json"),
        "text": fingerprint(windows),
        "versions": versions(),
        "model": model_fingerprint(model),
        "device": device.type,
    }


def versions() -> dict[str, str]:
    """Versions that decide the bytes of a conversion."""
    import transformers

    return {
        "spikellm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def model_fingerprint(model: Any) -> str:
    """SHA-256 over the configuration, and over names, types, shapes and bytes of all parameters and
    buffers.
    """
    config = {
        key: value for key, value in model.config.to_dict().items() if not key.startswith("_")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)} {fingerprint(tensor)}\n".encode()
        )
        offload(tensor)
    return digest.hexdigest()
