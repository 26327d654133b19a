"""How many input channels of each layer, and of K and V, take more steps, for one budget of
arithmetic over the whole model: more where a step lowers the final loss more for what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.conversion.head_losses import SurveyedHeads
from spikellm.models.families import weight_and_bias
from spikellm.nn.channels import Sample, evidence_of
from spikellm.recipe import ActivationRecipe
from spikellm.saliency.allocation import spend
from spikellm.saliency.layer_loss import least_losses

SHARE = 0.025  # of the channels of a tensor that are decided on at a time
_SHARES = round(1 / SHARE)


class _Tensor(NamedTuple):
    """One tensor whose channels may take more steps.

    Attributes:
        readers: under which names its number of salient channels is told.
        channels: how many it has.
        losses: expected loss at 0, 1, 2 … shares of them.
        cost: bit operations a token that all of them would add.
        rate: which part of that the settings give to the common budget.
    """

    readers: tuple[str, ...]
    channels: int
    losses: Tensor
    cost: int
    rate: float


class StepShares:
    """Collects what more steps would gain, then shares them out.

    The budget is what every tensor would take at its own rate (``salient_rate``); it is counted in
    bit operations (ACE), as a report counts them.

    Args:
        seed: of criteria that draw at random.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tensors: list[_Tensor] = []

    def look(self, layers: Iterable[SurveyedLayer]) -> None:
        """Take note of the layers of one block whose settings say ``allocation: model``."""
        by_reader: dict[tuple[str, ...], list[SurveyedLayer]] = {}
        for layer in layers:
            if layer.settings.activations.allocated_over_model:
                by_reader.setdefault(layer.shared_input_layers, []).append(layer)
        for readers, group in by_reader.items():
            settings, sample = group[0].settings.activations, group[0].sample
            weights = [
                weight_and_bias(layer.module)[0].detach().float()
                * layer.sensitivity.sqrt().unsqueeze(1)
                for layer in group
            ]
            observed = Sample(sample, torch.cat(weights))
            evidence = evidence_of(observed, settings, 0.0, self._seed, readers[0])
            channels = sample.shape[1]
            losses = torch.tensor(least_losses(evidence, _counts(channels)))
            bits = sum(
                len(weight) * layer.settings.weights.bits
                for weight, layer in zip(weights, group, strict=True)
            )
            self._note(settings, _Tensor(readers, channels, losses, channels * bits, 0.0))

    def look_at_heads(self, heads: Iterable[SurveyedHeads]) -> None:
        """Take note of K and V of one block; all heads take the same number of channels."""
        for one in heads:
            few, many = one.losses
            losses = torch.linspace(few, many, _SHARES + 1, dtype=torch.float64)
            self._note(one.settings, _Tensor((one.name,), one.channels, losses, one.cost, 0.0))

    def _note(self, settings: ActivationRecipe, tensor: _Tensor) -> None:
        added = max(settings.salient_steps - settings.steps, 1) * settings.bits
        self._tensors.append(tensor._replace(cost=tensor.cost * added, rate=settings.salient_rate))

    def counts(self) -> dict[str, int]:
        """Salient channels of every layer, and of every head of K and V."""
        if not self._tensors:
            return {}
        errors = torch.stack([tensor.losses for tensor in self._tensors], 1)
        costs = [tensor.cost for tensor in self._tensors]
        given = sum(tensor.rate * tensor.cost for tensor in self._tensors)
        shares = spend(errors, 1 + given / sum(costs) / SHARE, costs) - 1
        found: dict[str, int] = {}
        for tensor, share in zip(self._tensors, shares.tolist(), strict=True):
            while share and tensor.losses[share - 1] <= tensor.losses[share]:
                share -= 1  # noqa: PLW2901  what gains nothing is not spent
            found.update(dict.fromkeys(tensor.readers, _counts(tensor.channels)[share]))
        return found


def _counts(channels: int) -> list[int]:
    """Channels of 0, 1, 2 … shares."""
    return [round(place * SHARE * channels) for place in range(_SHARES + 1)]
