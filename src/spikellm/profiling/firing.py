"""Spikes of a train, counted by channel and execution mode."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.nn.hooks import SpikeTrain
from spikellm.profiling.counts import EXECUTION_MODES, Firing
from spikellm.recipe.sections import MAX_TOP_CODE

_EXACT_ROWS = 2**24 // MAX_TOP_CODE


def count_spikes(codes: Tensor, levels: int) -> dict[str, Tensor]:
    """Non-zero spikes by execution mode, summed over all but the last dimension: int64
    ``(channels,)`` each.

    All spikes of a drained train are full except its last.

    Args:
        codes: merged codes, ``(…, channels)``.
        levels: L.
    """
    flat, channels = codes.reshape(-1, codes.shape[-1]), codes.shape[-1]
    found = {}
    for mode in EXECUTION_MODES:
        found[mode] = torch.zeros(channels, dtype=torch.int64, device=codes.device)
    # Sums of integers in float32 are exact below 2**24, and much faster than those of integers.
    for part in flat.split(_EXACT_ROWS):
        size = part.abs().float()
        found["binary"] += size.sum(0).long()
        found["stepped"] += (size + (levels - 1)).div_(levels).floor_().sum(0).long()
        found["merged"] += size.clamp_(max=1).sum(0).long()
    return found


def firing_of(train: SpikeTrain, fired: dict[str, Tensor]) -> Firing:
    """Counts and rates of one train; ``fired`` as :func:`count_spikes` gives it."""
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
    )
