"""Spikes of a train, counted by channel and execution mode."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from spikellm.neurons import Recoding
from spikellm.neurons.phase import digits_that_fire
from spikellm.nn.hooks import SpikeTrain
from spikellm.profiling.counts import EXECUTION_MODES, Firing

Fired = dict[str, Tensor]
"""Non-zero spikes of every channel by execution mode, int64 ``(channels,)`` each."""


def count_spikes(counts: Tensor, levels: int, recoding: Recoding = "binary") -> Fired:
    """Non-zero spikes of trains, summed over all but the last dimension.

    Args:
        counts: spikes less negative spikes, ``(…, channels)``, of one sign each.
        levels: L.
        recoding: digits of phase trains.
    """
    channels = counts.shape[-1]
    size = counts.reshape(-1, channels).abs()
    most = int(size.max()) if size.numel() else 0
    table = _spikes_by_size(most, levels, recoding).to(size.device)
    if most < len(size):
        # How often each channel has each size; far fewer numbers than codes.
        place = size + torch.arange(channels, dtype=size.dtype, device=size.device) * (most + 1)
        often = torch.bincount(place.flatten(), minlength=channels * (most + 1))
        found = (often.view(channels, most + 1).double() @ table.double()).long()
    else:
        found = table[size.long()].sum(0)
    return dict(zip(EXECUTION_MODES, found.unbind(1), strict=True))


@lru_cache(maxsize=64)
def _spikes_by_size(most: int, levels: int, recoding: Recoding) -> Tensor:
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


def firings(train: SpikeTrain) -> tuple[Fired, Fired]:
    """Spikes of a train, and those that it had if it were of the codes themselves."""
    neuron, codes = train.neuron, train.codes
    fired = count_spikes(train.fired, neuron.levels, neuron.recoding)
    if not neuron.centered:
        return fired, fired
    return fired, count_spikes(codes, neuron.levels, neuron.recoding)


def firing_of(train: SpikeTrain, fired: Fired, from_zero: Fired) -> Firing:
    """Counts and rates of one train, of what :func:`firings` gives."""
    steps = train.steps.expand(*train.steps.shape[:-1], train.codes.shape[-1])
    repeats = train.codes.numel() // steps.numel()
    slots = steps.reshape(-1, steps.shape[-1]).sum(0, dtype=torch.int64) * repeats
    binary, most = fired["binary"], slots * train.neuron.levels
    if train.part == "probabilities":  # their channels are keys, whose number grows with the tokens
        binary, most = binary.sum(0, keepdim=True), most.sum(0, keepdim=True)
    return Firing(
        codes=train.codes.numel(),
        slots=int(slots.sum()),
        spikes={mode: int(count.sum()) for mode, count in fired.items()},
        rates=(binary / most.clamp(min=1)).float(),
        from_zero={mode: int(count.sum()) for mode, count in from_zero.items()},
    )
