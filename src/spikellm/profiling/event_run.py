"""A layer run by events alone: spikes wait in a queue in the order of time, and each adds the
weights of its column to accumulators when it arrives.

No product is taken, and a weight of zero is no synapse. A spike of a phase train is worth a power
of two: accumulators double what they hold from one moment to the next
(:mod:`spikellm.profiling.shifts`). Weights that are spikes themselves arrive one by one: a weight
of two spikes is added twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.prepared import LinearWeights
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.population import EventForm, Population, channel_order
from spikellm.profiling.shifts import moments_of

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
        shifts: how often an accumulator was doubled.
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


def synapses_of(layer: SpikingLinear, plane: LinearWeights | None = None) -> Synapses:
    """Synapses of a layer; of one of its planes where those have accumulators of their own."""
    order, parts = channel_order(layer), layer.layout().segments
    segment = torch.empty(layer.in_features, dtype=torch.int64)
    for index, part in enumerate(parts):
        segment[order[part.start : part.stop]] = index
    planes = weight_planes(layer, plane)
    reach = torch.stack([(plane != 0).sum(1) for plane in planes]).sum(0)
    return Synapses(planes, segment, len(parts), reach)


def weight_planes(layer: SpikingLinear, plane: LinearWeights | None = None) -> list[Tensor]:
    """See :attr:`Synapses.weights`."""
    stored, order = (plane or layer).integer_weights().long().cpu(), channel_order(layer)
    weights = torch.empty_like(stored).index_copy_(1, order, stored).T.contiguous()
    if not layer.format.unrolls:
        return [weights]
    return [
        (weights > t).long() - (-weights > t).long() for t in range(int(weights.abs().max()))
    ] or [weights]


def moments_by_segment(
    population: Population, synapses: Synapses, form: EventForm = "binary"
) -> Tensor:
    """Powers of two in which the accumulators of every token and segment are told what they sum,
    int64 ``(tokens, segments)``: one in binary form, else the moments of their channels.
    """
    tokens = len(population.codes)
    if form == "binary":
        return torch.ones(tokens, synapses.segments, dtype=torch.int64)
    steps = torch.zeros(tokens, synapses.segments, dtype=torch.int64)
    place = synapses.segment.expand(tokens, -1)
    steps.scatter_reduce_(1, place, population.code_steps, "amax")
    return moments_of(population.neuron, steps)


def run_events(events: Events, synapses: Synapses, moments: Tensor) -> EventRun:
    """Let spikes arrive one after the other; each adds its weights to the accumulators of its token
    and segment, which double from moment to moment.

    Args:
        moments: see :func:`moments_by_segment`.
    """
    outputs = synapses.weights[0].shape[1]
    sums = torch.zeros(moments.numel(), outputs, dtype=torch.int64)
    additions = shifts = 0
    for place in reversed(range(int(moments.max()) if moments.numel() else 0)):
        doubled = moments.flatten() > place + 1
        sums[doubled] *= 2
        shifts += int(doubled.sum()) * outputs
        for some in (events.place == place).nonzero().flatten().split(_AT_ONCE // outputs + 1):
            token, channel = events.token[some], events.channel[some]
            accumulator = token * synapses.segments + synapses.segment[channel]
            for weights in synapses.weights:
                sums.index_add_(0, accumulator, weights[channel] * events.sign[some, None])
            additions += int(synapses.fan_out[channel].sum())
    shape = *moments.shape, outputs
    return EventRun(sums.view(shape), len(events.time), additions, shifts)
