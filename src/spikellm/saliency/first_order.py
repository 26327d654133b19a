"""First-order saliency (SpikeLLM, §3.2): the mean over tokens of ``X ∘ (X Wᵀ W)``, half of
``∂‖XWᵀ‖²/∂X ∘ X``.

It does not change when a channel is scaled and its weight column divided by the same factor, so it
is blind to outlier channels. That is no harm where all channels share a range; with split ranges
use :mod:`spikellm.saliency.layer_loss`.
"""

from __future__ import annotations

from torch import Tensor

from spikellm.saliency.base import Evidence, ranks


def _products(evidence: Evidence) -> Tensor:
    return evidence.x * evidence.response


@ranks("first-order")
def first_order(evidence: Evidence) -> Tensor:
    """Signed, as published."""
    return _products(evidence).mean(0)


@ranks("first-order-absolute")
def first_order_absolute(evidence: Evidence) -> Tensor:
    """Absolute value before the mean: contributions of either sign count."""
    return _products(evidence).abs().mean(0)
