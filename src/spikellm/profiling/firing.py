"""Spikes of a train, counted by channel and execution mode."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.neurons import Recoding, SoftResetNeuron
from spikellm.neurons.phase import digits_that_fire
from spikellm.nn.hooks import SpikeTrain
from spikellm.profiling.counts import EXECUTION_MODES, Firing
from spikellm.recipe.sections import MAX_TOP_CODE

_EXACT_ROWS = 2**24 // MAX_TOP_CODE
_MOST_PAIRS = 1 << 18  # of a baseline and a code, that are told apart


class Fired(NamedTuple):
    """Non-zero spikes of a train.

    Attributes:
        total: by execution mode.
        channels: of every channel by execution mode, int64 ``(channels,)``; in binary mode alone
            unless all are asked for.
    """

    total: dict[str, int]
    channels: dict[str, Tensor]


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


def firings(train: SpikeTrain, *, by_channel: bool = False) -> tuple[Fired, Fired]:
    """Spikes of a train, and those that it had if it were of the codes themselves.

    Args:
        by_channel: count every mode by channel, which takes longer.
    """
    neuron = train.neuron
    if not by_channel and (often := _pairs(train)) is not None:
        table = _spikes_by_pair(math.isqrt(len(often)), neuron)
        found = (often.double() @ table.to(often.device)).long().tolist()
        own, zero = (
            dict(zip(EXECUTION_MODES, part, strict=True))
            for part in (found[: len(EXECUTION_MODES)], found[len(EXECUTION_MODES) :])
        )
        return Fired(own, {"binary": _binary(train)}), Fired(zero, {})
    of_train, of_codes = (
        count_spikes(one, neuron.levels, neuron.recoding) for one in (train.fired, train.codes)
    )
    return _summed(of_train), _summed(of_codes)


def _binary(train: SpikeTrain) -> Tensor:
    """Binary spikes of every channel, int64 ``(channels,)``."""
    channels = train.codes.shape[-1]
    sizes = train.codes.float()  # of one sign where nothing is centered
    if train.neuron.centered:
        sizes.sub_(train.baseline.float()).abs_()  # of one type, or it takes five times as long
    sizes = sizes.reshape(-1, channels)
    found = torch.zeros(channels, dtype=torch.int64, device=sizes.device)
    # Sums of integers in float32 are exact below 2**24, and much faster than those of integers.
    for size in sizes.split(_EXACT_ROWS):
        found += size.sum(0).long()
    return found


def _pairs(train: SpikeTrain) -> Tensor | None:
    """How often each baseline meets each code, int64 ``(baselines · codes,)``: both trains follow
    from it. None where there would be more pairs than codes.
    """
    codes, z = train.codes, train.baseline.to(torch.int32)
    if not codes.numel() or train.neuron.signed:
        return None
    spread = int(train.neuron.top(int(train.steps.max()))) + 1
    if spread**2 > min(_MOST_PAIRS, codes.numel()):
        return None
    return torch.bincount(torch.add(codes, z, alpha=spread).flatten(), minlength=spread**2)


@lru_cache(maxsize=16)
def _spikes_by_pair(spread: int, neuron: SoftResetNeuron) -> Tensor:
    """Spikes of the train and of the code of every pair, float64 ``(pairs, 2 · modes)``."""
    pair = torch.arange(spread**2)
    z, code = pair // spread, pair % spread
    table = spikes_by_size(spread - 1, neuron.levels, neuron.recoding).double()
    return torch.cat([table[neuron.fired(code, z).abs()], table[code]], dim=1)


def _summed(channels: dict[str, Tensor]) -> Fired:
    return Fired({mode: int(count.sum()) for mode, count in channels.items()}, channels)


def firing_of(train: SpikeTrain, fired: Fired, from_zero: Fired) -> Firing:
    """Counts and rates of one train, of what :func:`firings` gives."""
    steps = train.steps.expand(*train.steps.shape[:-1], train.codes.shape[-1])
    repeats = train.codes.numel() // steps.numel()
    slots = steps.reshape(-1, steps.shape[-1]).sum(0, dtype=torch.int64) * repeats
    binary, most = fired.channels["binary"], slots * train.neuron.levels
    if train.part == "probabilities":  # their channels are keys, whose number grows with the tokens
        binary, most = binary.sum(0, keepdim=True), most.sum(0, keepdim=True)
    return Firing(
        codes=train.codes.numel(),
        slots=int(slots.sum()),
        spikes=fired.total,
        rates=(binary / most.clamp(min=1)).float(),
        from_zero=from_zero.total,
    )
