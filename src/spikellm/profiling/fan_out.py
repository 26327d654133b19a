"""Synapses that a spike at the input of a layer reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.counts import EXECUTION_MODES


def fan_out(layer: SpikingLinear) -> Tensor:
    """Synapses of every stored column by execution mode, int64 ``(in, modes)``, or ``(in, 1)``
    where they are the same in all: the column's weights that are not zero, or its weight spikes
    where weights are spikes, or those of all its planes; all outputs where weights are no integers.
    """
    if layer.format.integer_form == "planes":
        own = [count_by_column(plane.integer_weights() != 0) for plane in layer.planes()]
        return torch.stack(own).sum(0).unsqueeze(1)
    if not layer.format.has_integers:
        return torch.full(
            (layer.in_features, 1), layer.out_features, device=layer.channel_group.device
        )
    weights = layer.integer_weights()
    merged = count_by_column(weights != 0)
    if not layer.format.unrolls:
        return merged.unsqueeze(1)
    unrolled = weights.abs().sum(0, dtype=torch.int64)
    return torch.stack([merged if mode == "merged" else unrolled for mode in EXECUTION_MODES], 1)


def count_by_column(marks: Tensor) -> Tensor:
    """How many marks of each column are set, int64 ``(columns,)``, of bool ``(rows, columns)``.

    Eight columns are added in one integer, a byte each, as many rows as a byte counts.
    """
    columns = marks.shape[1]
    if columns % 8:
        return marks.sum(0)
    words = marks.contiguous().view(torch.int64)
    parts = [part.sum(0) for part in words.split(255)]
    total = torch.stack(parts).view(torch.uint8) if parts else marks.new_zeros(1, columns)
    return total.sum(0)
