"""How many input channels of each layer take more steps, for one mean over the whole model: more
where a step lowers the final loss more for what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.algorithms.survey import SurveyedLayer
from spikellm.models.families import weight_and_bias
from spikellm.nn.channels import Sample, evidence_of
from spikellm.recipe import ActivationRecipe
from spikellm.saliency.allocation import spend
from spikellm.saliency.layer_loss import least_losses

SHARE = 0.025  # of the channels of a tensor that are decided on at a time
_MOST = 0.5


class _Tensor(NamedTuple):
    """One tensor that layers read: who, channels, expected loss at 0, 1, 2 … shares, products that
    a share costs.
    """

    readers: tuple[str, ...]
    channels: int
    losses: Tensor
    cost: int


class StepShares:
    """Collects what more steps would gain, then shares them out.

    Args:
        seed: of criteria that draw at random.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tensors: dict[ActivationRecipe, list[_Tensor]] = {}

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
            losses = least_losses(evidence, _counts(channels))
            self._tensors.setdefault(settings, []).append(
                _Tensor(readers, channels, torch.tensor(losses), channels * sum(map(len, weights)))
            )

    def counts(self) -> dict[str, int]:
        """Salient channels of every layer.

        Layers with different settings share each their own mean.
        """
        found: dict[str, int] = {}
        for settings, tensors in self._tensors.items():
            errors = torch.stack([tensor.losses for tensor in tensors], 1)
            shares = (
                spend(
                    errors, 1 + settings.salient_rate / SHARE, [tensor.cost for tensor in tensors]
                )
                - 1
            )
            for tensor, share in zip(tensors, shares.tolist(), strict=True):
                found.update(dict.fromkeys(tensor.readers, _counts(tensor.channels)[share]))
        return found


def _counts(channels: int) -> list[int]:
    """Channels of 0, 1, 2 … shares."""
    return [round(place * SHARE * channels) for place in range(round(_MOST / SHARE) + 1)]
