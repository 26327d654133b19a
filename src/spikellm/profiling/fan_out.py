"""Synapses that a spike at the input of a layer reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.counts import EXECUTION_MODES


def fan_out(layer: SpikingLinear) -> Tensor:
    """Synapses of every stored column by execution mode, int64 ``(in, modes)``: the column's
    weights that are not zero, or its weight spikes where weights are spikes; all outputs where
    weights are no integers.
    """
    if layer.format.integer_form == "none":
        shape = layer.in_features, len(EXECUTION_MODES)
        return torch.full(shape, layer.out_features, device=layer.channel_group.device)
    size = layer.integer_weights().abs()
    merged = (size > 0).sum(0, dtype=torch.int32).long()
    unrolled = size.sum(0, dtype=torch.int64) if layer.format.unrolls else merged
    return torch.stack([merged if mode == "merged" else unrolled for mode in EXECUTION_MODES], 1)
