"""Controls for ablations of saliency scores.

The inverted ranking is a flag of the recipe (``invert``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.saliency.base import Evidence, ranks


@ranks("random")
def random(evidence: Evidence) -> Tensor:
    """A random order, decided by the recipe's seed and the layer's name."""
    return torch.rand(evidence.x.shape[1], generator=evidence.generator).to(evidence.x.device)


@ranks("magnitude")
def magnitude(evidence: Evidence) -> Tensor:
    """Mean magnitude of each channel."""
    return evidence.x.abs().mean(0)
