"""A glimpse of the spikes of every layer: one token unrolled, and how many spikes values have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.plots.grid import place_of
from spikellm.profiling.population import (
    EventForm,
    Population,
    attention_populations,
    layer_population,
)

_MOMENTS = 64  # of a binary train that is drawn, at most; longer ones are drawn in phases


class Glimpse(NamedTuple):
    """Spikes of one population. Channels are in the order of the model.

    Attributes:
        token: the token that was unrolled, the last of those that were run.
        form: how; in phases where binary spikes would take too many moments.
        planes: its spikes, int8 ``(moments, channels)``.
        salient: bool ``(channels,)``, see :attr:`Population.salient`.
        sizes: how many values of all tokens that were run have each number of spikes, negative ones
            subtracted, int64: from ``-(len // 2)`` on.
    """

    token: int
    form: EventForm
    planes: Tensor
    salient: Tensor
    sizes: Tensor


def glimpses(
    model: nn.Module, coding: dict[str, SpikingLinear], tokens: Tensor
) -> dict[str, Glimpse]:
    """Glimpses of all inputs of layers, and of Q, K and V, that are coded, by layer (``NAME``) or
    module and part (``NAME.query``); of experts that stand in one place of their blocks, of the
    first that is run.

    Args:
        coding: layers that code their inputs, by name.
        tokens: a window, ``(1, tokens)``.
    """
    found: dict[str, Glimpse] = {}
    places = set()

    def look(name: str, layer: SpikingLinear, x: Tensor) -> None:
        place = place_of(name) or name
        if x.numel() and place not in places:
            places.add(place)
            found[name] = glimpse_of(layer_population(name, layer, x))

    def hook(name: str, layer: SpikingLinear) -> Any:
        return layer.register_forward_pre_hook(lambda _, given: look(name, layer, given[0]))

    trains: list[SpikeTrain] = []

    def note(train: SpikeTrain) -> None:
        if isinstance(train.source, SpikingAttention):
            trains.append(train)

    handles = [hook(name, layer) for name, layer in coding.items()]
    try:
        with torch.no_grad(), observe_spikes(note):
            model(tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for population in attention_populations(trains, model):
        found[population.name] = glimpse_of(population)
    return found


def glimpse_of(population: Population) -> Glimpse:
    """A glimpse of the last token of a population."""
    token = len(population.codes) - 1
    longest = int(population.code_steps[token].max()) * population.neuron.levels
    form: EventForm = "binary" if longest <= _MOMENTS else "phase"
    fired = population.fired.flatten().long()
    most = int(fired.abs().max())
    sizes = torch.bincount(fired + most, minlength=2 * most + 1)
    planes = population.of_token(token, form)
    return Glimpse(token, form, planes, population.salient, sizes)
