"""Saliency criteria: which channels get more steps, and which of them a range of their own.

A criterion is a function from :class:`Evidence` to a :class:`Selection`. Most of them rank channels
by a score and are written as a function from evidence to scores under ``@ranks(name)``; any other
registers itself under ``@criteria.register(name)``. A new criterion is a new file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core.registry import Registry
from spikellm.neurons.base import SoftResetNeuron
from spikellm.quantization.thresholds import ThresholdSource


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer when its channels are chosen.

    Attributes:
        x: input activations of sampled tokens, float32, ``(tokens, in)``, from the already
            converted blocks below.
        weight: float32, ``(out, in)``.
        neuron: the neuron that will code the inputs.
        steps: T of ordinary channels.
        salient_steps: T of salient channels.
        count: channels to be chosen.
        split: whether salient channels may have a range of their own.
        symmetric: whether ranges are symmetric around zero.
        invert: take the lowest scores instead of the highest.
        generator: for criteria that draw at random.
        gradient: ``½ ∂‖Y‖²/∂X`` where Y is not ``XWᵀ``, ``(tokens, in)``; None where it is.
        share, source: see :func:`spikellm.quantization.thresholds.coded_range`.
    """

    x: Tensor
    weight: Tensor
    neuron: SoftResetNeuron
    steps: int
    salient_steps: int
    count: int
    split: bool
    symmetric: bool
    invert: bool
    generator: torch.Generator
    gradient: Tensor | None = None
    share: float = 1.0
    source: ThresholdSource = "range"

    @property
    def response(self) -> Tensor:
        """``½ ∂‖Y‖²/∂X`` of the output Y that the inputs make, ``(tokens, in)``: ``X WᵀW`` for a
        linear layer, or as given.
        """
        return self.x @ (self.weight.T @ self.weight) if self.gradient is None else self.gradient

    @property
    def column_energy(self) -> Tensor:
        """‖W[:,c]‖² of every channel, ``(in,)``."""
        return self.weight.square().sum(0)


class Selection(NamedTuple):
    """Chosen channels, both bool ``(in,)``: those with more steps, and those of them whose range is
    their own.
    """

    salient: Tensor
    own_range: Tensor


Criterion = Callable[[Evidence], Selection]
Score = Callable[[Evidence], Tensor]
criteria: Registry[Criterion] = Registry("saliency")


@dataclass(frozen=True)
class Ranking:
    """A criterion that takes the ``count`` channels of the highest scores, or the lowest.

    With split ranges all of them get their own.
    """

    score: Score

    def __call__(self, evidence: Evidence) -> Selection:
        salient = choose(self.score(evidence), evidence.count, invert=evidence.invert)
        return Selection(salient, salient if evidence.split else torch.zeros_like(salient))


def ranks(name: str) -> Callable[[Score], Score]:
    """Register a :class:`Ranking` by a score."""

    def enter(score: Score) -> Score:
        criteria.register(name)(Ranking(score))
        return score

    return enter


def rankings() -> list[str]:
    """Names of the criteria that rank channels: others cannot be inverted, nor choose columns of
    weights.
    """
    return [name for name in criteria.names() if isinstance(criteria[name], Ranking)]


def salient_count(rate: float, channels: int) -> int:
    """Channels at a given rate: rounded, at least one where the rate is above 0, never all."""
    return 0 if rate <= 0 else max(1, min(channels - 1, round(rate * channels)))


def ranking(scores: Tensor, *, invert: bool = False) -> Tensor:
    """Channels in falling order of score (rising if inverted); ties keep the order of channels."""
    return torch.sort(scores, descending=not invert, stable=True).indices


def choose(scores: Tensor, count: int, *, invert: bool = False) -> Tensor:
    """Mask of the ``count`` first channels of the ranking: bool, ``(channels,)``."""
    mask = torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    mask[ranking(scores, invert=invert)[:count]] = True
    return mask
