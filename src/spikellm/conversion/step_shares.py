"""How many input channels of each layer, and of K and V, take more steps, for one budget of
arithmetic over the whole model: more where a step lowers the final loss more for what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.algorithms.survey import SurveyedLayer, by_tensor
from spikellm.conversion.head_losses import SurveyedHeads
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
        wanted = (one for one in layers if one.settings.activations.allocated_over_model)
        for group in by_tensor(wanted):
            first, weights = group[0], [layer.sensitive_weight for layer in group]
            settings, readers = first.settings.activations, first.shared_input_layers
            observed = Sample(first.sample, torch.cat(weights))
            evidence = evidence_of(observed, settings, 0.0, self._seed, readers[0])
            channels = first.sample.shape[1]
            losses = torch.tensor(least_losses(evidence, _counts(channels)))
            bits = sum(
                len(weight) * layer.settings.weights.bits
                for weight, layer in zip(weights, group, strict=True)
            )
            cost = channels * bits * _added(settings)
            self._tensors.append(_Tensor(readers, channels, losses, cost, settings.salient_rate))

    def look_at_heads(self, heads: Iterable[SurveyedHeads]) -> None:
        """Take note of K and V of one block; all heads take the same number of channels."""
        for one in heads:
            few, many = one.losses
            losses = torch.linspace(few, many, _SHARES + 1, dtype=torch.float64)
            cost, rate = one.cost * _added(one.settings), one.settings.salient_rate
            self._tensors.append(_Tensor((one.name,), one.channels, losses, cost, rate))

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


def _added(settings: ActivationRecipe) -> int:
    """Bits that a salient channel takes more; those of one step where it takes none."""
    return max(settings.salient_steps - settings.steps, 1) * settings.bits


def _counts(channels: int) -> list[int]:
    """Channels of 0, 1, 2 … shares."""
    return [round(place * SHARE * channels) for place in range(_SHARES + 1)]
