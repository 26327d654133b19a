"""Which channels get more steps: what a criterion sees, how channels are chosen from its scores.

A criterion is a function from :class:`Evidence` to one score a channel, larger for more salient. Adding one is adding a file with a
function under ``@criteria.register(name)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spikellm.neurons.base import SoftResetNeuron
from spikellm.registry import Registry


@dataclass(frozen=True)
class Evidence:
    """What is known of a linear layer when its channels are ranked.

    Attributes:
        x: input activations of sampled tokens, float32, ``(tokens, in)``, from the already converted blocks below.
        weight: float32, ``(out, in)``.
        neuron: the neuron that will code the inputs.
        steps: T of ordinary channels.
        salient_steps: T of salient channels.
        count: channels to be chosen.
        thresholds: whether the chosen channels get a range of their own.
        generator: for criteria that draw at random.
    """

    x: Tensor
    weight: Tensor
    neuron: SoftResetNeuron
    steps: int
    salient_steps: int
    count: int
    thresholds: Literal["split", "shared"]
    generator: torch.Generator

    @property
    def column_energy(self) -> Tensor:
        """‖W[:,c]‖² of every channel, ``(in,)``."""
        return self.weight.square().sum(0)


Criterion = Callable[[Evidence], Tensor]
criteria: Registry[Criterion] = Registry("saliency")


def salient_count(rate: float, channels: int) -> int:
    """Channels that a rate stands for: rounded, at least one when the rate is above 0, never all."""
    return 0 if rate <= 0 else max(1, min(channels - 1, round(rate * channels)))


def ranking(scores: Tensor, *, invert: bool = False) -> Tensor:
    """Channels in falling order of score (rising if inverted); ties keep the order of channels."""
    return torch.sort(scores, descending=not invert, stable=True).indices


def choose(scores: Tensor, count: int, *, invert: bool = False) -> Tensor:
    """Mask of the ``count`` first channels of the ranking: bool, ``(channels,)``."""
    mask = torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    mask[ranking(scores, invert=invert)[:count]] = True
    return mask
