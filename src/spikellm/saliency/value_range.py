"""Range criteria: large channels, which widen the range of all that share their threshold."""

from __future__ import annotations

from torch import Tensor

from spikellm.saliency.base import Evidence, ranks


@ranks("rms")
def rms(evidence: Evidence) -> Tensor:
    """Root mean square of each channel."""
    return evidence.x.square().mean(0).sqrt()


@ranks("maximum")
def maximum(evidence: Evidence) -> Tensor:
    """Largest magnitude of each channel."""
    return evidence.x.abs().amax(0)
