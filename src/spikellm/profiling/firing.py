"""Spikes of a train, counted by channel and execution mode."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.sums import sum_by_channel
from spikellm.neurons import Recoding
from spikellm.neurons.phase import digits_that_fire
from spikellm.nn.hooks import SpikeTrain
from spikellm.profiling.counts import EXECUTION_MODES, Firing

_BYTE = 255


class Fired(NamedTuple):
    """Non-zero spikes of a train.

    Attributes:
        total: by execution mode.
        binary: binary spikes of every channel, int64 ``(channels,)``.
        reached: synapses that they reach, by execution mode; nothing where none were given.
    """

    total: dict[str, int]
    binary: Tensor
    reached: dict[str, int]


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


def firings(train: SpikeTrain, reach: Tensor | None = None) -> tuple[Fired, Fired]:
    """Spikes of a train, and those that it had if it were of the codes themselves.

    Args:
        reach: synapses of every channel by execution mode, int64 ``(channels, modes)``.
    """
    own, zero = _by_channel(train)
    found = _fired(own, reach)
    return found, found if zero is own else _fired(zero, reach)


def _fired(spikes: Tensor, reach: Tensor | None) -> Fired:
    """Of spikes by channel and execution mode, int64 ``(channels, modes)``."""
    sums = [spikes.sum(0), *(() if reach is None else [(spikes * reach).sum(0)])]
    total, *reached = (
        dict(zip(EXECUTION_MODES, one, strict=True)) for one in torch.stack(sums).tolist()
    )
    return Fired(total, spikes[:, EXECUTION_MODES.index("binary")], *reached or ({},))


def _by_channel(train: SpikeTrain) -> tuple[Tensor, Tensor]:
    """Spikes of the train and of its codes by channel and execution mode, int64 ``(channels,
    modes)``; the same tensor where the train is that of the codes.
    """
    neuron, codes = train.neuron, train.shown
    baseline = train.shown_baseline if neuron.centered else None
    if codes.is_cpu and codes.numel():
        most = max(neuron.levels * int(train.steps.max()), _BYTE)
        table = spikes_by_size(most, neuron.levels, neuron.recoding)
        found = sum_by_channel(codes, baseline, table)
        if found is not None:
            return found
    spikes = [
        torch.stack(list(count_spikes(one, neuron.levels, neuron.recoding).values()), 1)
        for one in ((train.codes,) if baseline is None else (train.fired, train.codes))
    ]
    return spikes[0], spikes[-1]


def firing_of(train: SpikeTrain, fired: Fired, from_zero: Fired) -> Firing:
    """Counts and rates of one train, of what :func:`firings` gives."""
    steps = train.steps.expand(*train.steps.shape[:-1], train.shown.shape[-1])
    repeats = train.shown.numel() // steps.numel()
    slots = steps.reshape(-1, steps.shape[-1]).sum(0, dtype=torch.int64) * repeats
    binary, most = fired.binary, slots * train.neuron.levels
    if train.part == "probabilities":  # their channels are keys, whose number grows with the tokens
        binary, most = binary.sum(0, keepdim=True), most.sum(0, keepdim=True)
    return Firing(
        codes=train.shown.numel(),
        slots=int(slots.sum()),
        spikes=fired.total,
        rates=(binary / most.clamp(min=1)).float(),
        from_zero=from_zero.total,
    )
