"""Spike rasters: spikes of every neuron over time."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spikellm.neurons.base import Drive, SoftResetNeuron, Steps
from spikellm.quantization.thresholds import threshold_for_range, token_range


def spike_raster(
    x: Tensor,
    neuron: SoftResetNeuron,
    steps: Steps = 1,
    *,
    execution: Literal["stepped", "binary", "phase"] = "binary",
    drive: Drive = "drain",
) -> Tensor:
    """Raster of a tensor under its own per-token thresholds.

    Args:
        x: ``(..., channels)``, finite; the range of each token over its channels sets θ and z.
        steps: T, one number or one for each channel (θ is then divided so that every channel spans
            the range).
        execution: ``"stepped"`` for multi-level spikes, ``"binary"`` for {0, 1} or {−1, 0, 1},
            ``"phase"`` for digits, the largest power of two first.
        drive: in what order the spikes come; their sum is the same. All charge of phase spikes is
            there at the start.

    Returns:
        Integers ``(time, ..., channels)``: time is T, T·L in binary execution, and the digits of
        T·L in phase execution.

    Raises:
        ValueError: an unknown execution mode, or phase spikes of a constant drive.
    """
    low, high = token_range(x.float())
    theta, baseline = threshold_for_range(low, high, neuron.top(steps), signed=neuron.signed)
    if execution == "phase":
        if drive != "drain":
            raise ValueError(f"phase spikes take all charge at the start; drive is {drive!r}")
        return neuron.simulate_phase(x, theta, baseline, steps).spikes
    spikes = neuron.simulate(x, theta, baseline, steps, drive).spikes
    if execution == "stepped":
        return spikes
    if execution == "binary":
        return torch.cat([torch.stack(list(neuron.iterate_binary(spike))) for spike in spikes])
    raise ValueError(f"unknown execution mode {execution!r} (valid: stepped, binary, phase)")
