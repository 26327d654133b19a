"""A layer run by events alone: spikes wait in a queue in the order of time, and each adds the
weights of its column to accumulators when it arrives.

No product is taken. A spike of a phase train is worth a power of two, so its weights are shifted
before they are added. Weights that are spikes themselves arrive one by one: a weight of two spikes
is added twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.population import EventForm, Population, channel_order

_AT_ONCE = 1 << 21  # weights that arrive between two looks at the queue


class Events(NamedTuple):
    """Spikes in the order of time, token and channel; ``(spikes,)`` each.

    Attributes:
        time: moment, int64. ``token`` and ``channel``, int64, who fired.
        sign: int8, 1 or −1.
        place: k of what the spike is worth, 2^k, int64.
    """

    time: Tensor
    token: Tensor
    channel: Tensor
    sign: Tensor
    place: Tensor


class Synapses(NamedTuple):
    """Where the spikes of a layer's inputs go.

    Attributes:
        weights: integers ``(in, out)``, int64, channels in their own order; of ternary weights one
            plane of {−1, 0, 1} a step, whose sum they are.
        segment: accumulator of every channel: columns that share a threshold and a scale add up,
            int64 ``(in,)``.
        segments: how many.
        fan_out: additions that a spike of each channel sets off, int64 ``(in,)``.
    """

    weights: list[Tensor]
    segment: Tensor
    segments: int
    fan_out: Tensor


class EventRun(NamedTuple):
    """What a queue of spikes set off.

    Attributes:
        sums: what the accumulators hold in the end, int64 ``(tokens, segments, out)``.
        spikes: how many arrived.
        additions: weights that were added or subtracted.
        shifts: of these, weights that were shifted first.
    """

    sums: Tensor
    spikes: int
    additions: int
    shifts: int


def events_of(population: Population, form: EventForm = "binary") -> Events:
    """The queue of a population's spikes."""
    columns: list[list[Tensor]] = [[] for _ in Events._fields]
    for time, (plane, place) in enumerate(population.planes(form)):
        token, channel = plane.nonzero().unbind(1)
        own = (
            torch.full_like(token, time),
            token,
            channel,
            plane[token, channel],
            torch.full_like(token, place),
        )
        for column, part in zip(columns, own, strict=True):
            column.append(part)
    return Events(*(torch.cat(column) for column in columns))


def synapses_of(layer: SpikingLinear) -> Synapses:
    """Synapses of a layer."""
    order, parts = channel_order(layer), layer.layout().segments
    segment = torch.empty(layer.in_features, dtype=torch.int64)
    for index, part in enumerate(parts):
        segment[order[part.start : part.stop]] = index
    planes = weight_planes(layer)
    reach = torch.full((layer.in_features,), layer.out_features)
    if layer.format.unrolls:
        reach = torch.stack([(plane != 0).sum(1) for plane in planes]).sum(0)
    return Synapses(planes, segment, len(parts), reach)


def weight_planes(layer: SpikingLinear) -> list[Tensor]:
    """See :attr:`Synapses.weights`."""
    stored, order = layer.integer_weights().long().cpu(), channel_order(layer)
    weights = torch.empty_like(stored).index_copy_(1, order, stored).T.contiguous()
    if not layer.format.unrolls:
        return [weights]
    return [
        (weights > t).long() - (-weights > t).long() for t in range(int(weights.abs().max()))
    ] or [weights]


def run_events(events: Events, synapses: Synapses, tokens: int) -> EventRun:
    """Let spikes arrive one after the other; each adds its weights to the accumulators of its token
    and segment.
    """
    outputs = synapses.weights[0].shape[1]
    sums = torch.zeros(tokens * synapses.segments, outputs, dtype=torch.int64)
    additions = shifts = 0
    for _, token, channel, sign, place in zip(
        *(column.split(max(1, _AT_ONCE // max(outputs, 1))) for column in events), strict=True
    ):
        accumulator = token * synapses.segments + synapses.segment[channel]
        for weights in synapses.weights:
            arriving = (weights[channel] << place[:, None]) * sign[:, None]
            sums.index_add_(0, accumulator, arriving)
        reach = synapses.fan_out[channel]
        additions += int(reach.sum())
        shifts += int(reach[place > 0].sum())
    return EventRun(
        sums.view(tokens, synapses.segments, outputs), len(events.time), additions, shifts
    )
