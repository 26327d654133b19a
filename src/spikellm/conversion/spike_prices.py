"""Prices of a spike that are tried where a budget of spikes is shared out over the model."""

from __future__ import annotations

from torch import Tensor

from spikellm.neurons.price import spikes_of_counts, whole_price
from spikellm.recipe import ActivationRecipe

_PRICES = 16
_CHEAPEST = 1 / 16  # squared thresholds; below it hardly a decision moves


def prices_of(settings: ActivationRecipe) -> list[float]:
    """Prices that are tried, none first: evenly spaced in their logarithm, up to where values
    below half of the largest code are silent.
    """
    top = int(settings.make_neuron().top(settings.steps))
    most = float(top if settings.spikes_of == "binary" else max(top * top / 4, 1.0))
    ratio = (most / _CHEAPEST) ** (1 / (_PRICES - 1))
    return [0.0, *(whole_price(_CHEAPEST * ratio**place) for place in range(_PRICES))]


def mean_spikes(settings: ActivationRecipe, counts: Tensor) -> float:
    """Average spikes of counts, of the form that the settings budget."""
    table = spikes_of_counts(settings.spikes_of, settings.recoding).to(counts.device)
    return float(table[counts.abs().long()].double().mean())
