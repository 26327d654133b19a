"""Spikes of a train, counted by channel and execution mode."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.sums import Lookup, sum_by_channel
from spikellm.neurons import Recoding
from spikellm.neurons.phase import digits_that_fire
from spikellm.nn.hooks import SpikeTrain
from spikellm.profiling.counts import EXECUTION_MODES, Firing

_BYTE = 255


class Fired(NamedTuple):
    """Non-zero spikes of a train.

    Attributes:
        firing: of all channels together.
        spikes: of every channel by execution mode, int64 ``(channels, modes)``.
        from_zero: the same if the train were that of the codes themselves.
    """

    firing: Firing
    spikes: Tensor
    from_zero: Tensor

    def synapses(self, reach: Tensor) -> tuple[dict[str, int], dict[str, int]]:
        """Synapses that spikes reach by execution mode, and those that they would from zero.

        Args:
            reach: of a spike of every channel by execution mode, int64 ``(channels, modes)``.
        """
        both = torch.stack((self.spikes, self.from_zero)).mul_(reach).sum(1).tolist()
        own, zero = (dict(zip(EXECUTION_MODES, one, strict=True)) for one in both)
        return own, zero


class LastFired:
    """Counts trains; layers that were shown one and the same are counted once."""

    def __init__(self) -> None:
        self._last: tuple[SpikeTrain, Fired] | None = None

    def of(self, train: SpikeTrain) -> Fired:
        """Spikes of a train."""
        if self._last is None or not _same(self._last[0], train):
            self._last = train, fired_by(train)
        return self._last[1]


def _same(one: SpikeTrain, other: SpikeTrain) -> bool:
    return (
        one.shown is other.shown
        and one.shown_baseline is other.shown_baseline
        and one.part == other.part
        and one.neuron == other.neuron
        and torch.equal(one.steps, other.steps)
    )


def count_spikes(counts: Tensor, levels: int, recoding: Recoding = "binary") -> dict[str, Tensor]:
    """Non-zero spikes of every channel by execution mode, summed over all but the last dimension,
    int64 ``(channels,)`` each.

    Args:
        counts: spikes less negative spikes, ``(…, channels)``, of one sign each.
        levels: L.
        recoding: digits of phase trains.
    """
    channels = counts.shape[-1]
    size = counts.reshape(-1, channels).abs()
    most = int(size.max()) if size.numel() else 0
    table = spikes_by_size(most, levels, recoding).to(size.device)
    if most < len(size):
        # How often each channel has each size; far fewer numbers than codes.
        place = size + torch.arange(channels, dtype=size.dtype, device=size.device) * (most + 1)
        often = torch.bincount(place.flatten(), minlength=channels * (most + 1))
        found = (often.view(channels, most + 1).double() @ table.double()).long()
    else:
        found = table[size.long()].sum(0)
    return dict(zip(EXECUTION_MODES, found.unbind(1), strict=True))


@lru_cache(maxsize=64)
def spikes_by_size(most: int, levels: int, recoding: Recoding) -> Tensor:
    """Spikes of a count of ``0 … most`` in every execution mode, int64 ``(most + 1, modes)``.

    All spikes of a drained train are full except its last.
    """
    size = torch.arange(most + 1)
    found = {
        "merged": size.clamp(max=1),
        "stepped": (size + levels - 1) // levels,
        "binary": size,
        "phase": digits_that_fire(most, recoding),
    }
    return torch.stack([found[mode] for mode in EXECUTION_MODES], 1)


def fired_by(train: SpikeTrain) -> Fired:
    """Spikes of a train."""
    spikes, from_zero = _by_channel(train)
    totals = torch.stack((spikes.sum(0), from_zero.sum(0))).tolist()
    own, zero = (dict(zip(EXECUTION_MODES, one, strict=True)) for one in totals)
    steps = train.steps.expand(*train.steps.shape[:-1], train.shown.shape[-1])
    repeats = train.shown.numel() // steps.numel()
    slots = steps.reshape(-1, steps.shape[-1]).sum(0, dtype=torch.int64) * repeats
    binary, most = spikes[:, EXECUTION_MODES.index("binary")], slots * train.neuron.levels
    if train.part == "probabilities":  # their channels are keys, whose number grows with the tokens
        binary, most = binary.sum(0, keepdim=True), most.sum(0, keepdim=True)
    rates = (binary / most.clamp(min=1)).float()
    firing = Firing(train.shown.numel(), int(slots.sum()), own, rates, zero)
    return Fired(firing, spikes, from_zero)


def _by_channel(train: SpikeTrain) -> tuple[Tensor, Tensor]:
    """Spikes of the train and of its codes by channel and execution mode, int64 ``(channels,
    modes)``; the same tensor where the train is that of the codes.
    """
    neuron, codes = train.neuron, train.shown
    baseline = train.shown_baseline if neuron.centered else None
    if codes.is_cpu and codes.numel():
        most = max(neuron.levels * int(train.steps.max()), _BYTE)
        found = sum_by_channel(codes, baseline, _lookup(most, neuron.levels, neuron.recoding))
        if found is not None:
            return found
    spikes = [
        torch.stack(list(count_spikes(one, neuron.levels, neuron.recoding).values()), 1)
        for one in ((train.codes,) if baseline is None else (train.fired, train.codes))
    ]
    return spikes[0], spikes[-1]


@lru_cache(maxsize=64)
def _lookup(most: int, levels: int, recoding: Recoding) -> Lookup:
    return Lookup.of(spikes_by_size(most, levels, recoding))
