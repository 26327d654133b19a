"""Shifts of phase execution. A spike is worth a power of two, but no receiver shifts a weight:
moments come in the order of falling powers, so an accumulator doubles what it holds from one moment
to the next (Horner's rule),

    s ← 2·s + Σ weights of the spikes of this moment

An accumulator holds the sum of one output of one token over the columns that share a threshold and
a scale; it is doubled once less than its columns have moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.neurons import SoftResetNeuron
from spikellm.neurons.phase import places
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.attention_products import AttentionProduct


def moments_of(neuron: SoftResetNeuron, steps: Tensor) -> Tensor:
    """Moments of phase trains of so many steps, int64 of the shape of ``steps``."""
    most = int(steps.max()) if steps.numel() else 0
    table = torch.tensor(
        [places(neuron.levels * one, neuron.recoding) for one in range(most + 1)],
        dtype=torch.int64,
        device=steps.device,
    )
    return table[steps.long()]


def shifts_of_layer(layer: SpikingLinear, train: SpikeTrain) -> int:
    """Doublings of a layer's accumulators in one call."""
    steps = train.steps
    each = torch.stack(
        [steps[..., part.start : part.stop].amax(-1) for part in layer.layout().segments]
    )
    repeats = 1 if steps.dim() > 1 else len(train.shown)
    doubled = (moments_of(train.neuron, each) - 1).clamp(min=0)
    return int(doubled.sum()) * repeats * layer.out_features


def shifts_of_product(
    product: AttentionProduct, part: str, train: SpikeTrain, spikes: SpikingAttention
) -> int:
    """Doublings of the accumulators of one product of attention, one for each range of the part
    that drives it, of as many moments as its largest T asks for.
    """
    ranges = len(set(getattr(spikes.settings, part).group_ranges))
    moments = int(moments_of(train.neuron, train.steps.max()))
    return product.outputs * ranges * max(moments - 1, 0)
