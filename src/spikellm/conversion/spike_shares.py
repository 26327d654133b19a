"""At which price of a spike each layer's inputs, and K and V, are coded, for one budget of spikes
over the whole model.

Of every tensor it is measured on a sample what coding it at each of some prices loses and how many
spikes it takes; the budget then goes where a spike lowers the final loss most, so that all tensors
end at about the same slope of loss over spikes. A spike counts once for every output that reads
it: spikes a value are then synaptic operations over multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.algorithms import InputCoding
from spikellm.algorithms.channel_choice import search_share
from spikellm.algorithms.survey import SurveyedLayer, by_tensor
from spikellm.conversion.head_losses import SurveyedHeads
from spikellm.conversion.spike_prices import mean_spikes, prices_of
from spikellm.core.errors import RequestError
from spikellm.nn.fake_quant import InputCoder
from spikellm.quantization.thresholds import FULL_RANGE
from spikellm.recipe import ActivationRecipe
from spikellm.saliency.allocation import choose_within

_TOKENS = 512  # on which prices are tried


class _Tensor(NamedTuple):
    """One tensor whose spikes have a price.

    Attributes:
        readers: under which names its coding is told.
        codings: that were tried.
        losses: expected final loss a token, float64 ``(codings,)``.
        spikes: average of a value, float64 ``(codings,)``.
        products: multiply-accumulates a token that its values enter.
        budget: spikes a value that the settings give to the common budget.
    """

    readers: tuple[str, ...]
    codings: list[InputCoding]
    losses: Tensor
    spikes: Tensor
    products: int
    budget: float


class SpikeShares:
    """Collects what spikes are worth, then shares them out.

    The budget is what every tensor would take at its own ``spikes``, in synaptic operations.
    """

    def __init__(self) -> None:
        self._tensors: list[_Tensor] = []

    def look(self, layers: Iterable[SurveyedLayer]) -> None:
        """Take note of the layers of one block whose settings have a budget of spikes."""
        for group in by_tensor(one for one in layers if one.settings.activations.spikes):
            settings, sample = group[0].settings.activations, group[0].sample
            readers = group[0].shared_input_layers
            weights = torch.cat([layer.sensitive_weight for layer in group])
            x = sample[:: -(-len(sample) // _TOKENS)].float()
            codings = list(_codings(settings, x, weights))
            energy = weights.T @ weights
            tried = [_tried(settings, coding, x, energy) for coding in codings]
            losses, spikes = torch.tensor(tried, dtype=torch.float64).T
            self._tensors.append(
                _Tensor(readers, codings, losses, spikes, weights.numel(), settings.spikes)
            )

    def look_at_heads(self, heads: Iterable[SurveyedHeads]) -> None:
        """Take note of K and V of one block."""
        for one in heads:
            if one.priced is not None:
                prices, losses, spikes = one.priced
                codings = [InputCoding(price=price) for price in prices]
                self._tensors.append(
                    _Tensor((one.name,), codings, losses, spikes, one.products, one.settings.spikes)
                )

    def codings(self) -> dict[str, InputCoding]:
        """How inputs of every layer, K and V are coded; those whose spikes stay without a price are
        left out.

        Raises:
            RequestError: the budget is smaller than what the highest prices leave.
        """
        if not self._tensors:
            return {}
        costs = [one.spikes * one.products for one in self._tensors]
        products = sum(one.products for one in self._tensors)
        budget = sum(one.budget * one.products for one in self._tensors)
        least = float(sum(float(one.min()) for one in costs))
        if least > budget:
            raise RequestError(
                f"activations.spikes asks for {budget / products:.3g} spikes a value on average,"
                f" and at the highest price values take {least / products:.3g}; ask for more"
            )
        chosen = choose_within([one.losses for one in self._tensors], costs, budget)
        found: dict[str, InputCoding] = {}
        for tensor, place in zip(self._tensors, chosen, strict=True):
            if tensor.codings[place].price:
                found.update(dict.fromkeys(tensor.readers, tensor.codings[place]))
        return found


def _codings(settings: ActivationRecipe, x: Tensor, weight: Tensor) -> Iterator[InputCoding]:
    """What is tried: every price, and with a searched range some shares of it, since fewer spikes
    are worth a wider range.
    """
    share = most = settings.range_share
    if settings.search_range:
        share = search_share(settings, _one_group(x), x, weight)
        most = FULL_RANGE if settings.threshold_from == "range" else min(2 * share, 255)
    for price in prices_of(settings):
        wider = {share, (share + most) // 2, most} if price else {share}
        yield from (InputCoding(own, price) for own in sorted(wider))


def _tried(
    settings: ActivationRecipe, coding: InputCoding, x: Tensor, energy: Tensor
) -> tuple[float, float]:
    """Loss a token and spikes a value of inputs ``(tokens, in)``; ``energy`` is ``WᵀW``."""
    coder = InputCoder(settings, _one_group(x), coding.range_share, price=coding.price)
    error = coder.values(x) - x
    loss = float(((error @ energy) * error).sum(dtype=torch.float64)) / len(x)
    return loss, mean_spikes(settings, coder.counts(x))


def _one_group(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], dtype=torch.uint8, device=x.device)
