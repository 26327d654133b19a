"""Synapses that a spike at the input of a layer reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.counts import EXECUTION_MODES


def fan_out(layer: SpikingLinear) -> dict[str, Tensor]:
    """Synapses of every stored column, int64 ``(in,)``, by execution mode: the column's weights
    that are not zero, or its weight spikes where weights are spikes; all outputs where weights are
    no integers.
    """
    if layer.format.integer_form == "none":
        every = torch.full(
            (layer.in_features,), layer.out_features, device=layer.channel_group.device
        )
        return dict.fromkeys(EXECUTION_MODES, every)
    if not layer.format.unrolls:
        some = (layer.integer_weights() != 0).sum(0, dtype=torch.int32)
        return dict.fromkeys(EXECUTION_MODES, some.long())
    size = layer.integer_weights().abs()
    merged, unrolled = (size > 0).sum(0), size.sum(0, dtype=torch.int64)
    return {mode: merged if mode == "merged" else unrolled for mode in EXECUTION_MODES}
