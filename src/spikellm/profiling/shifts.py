"""Shifts of phase execution. A spike is worth a power of two, but no receiver shifts a weight:
moments come in the order of falling powers, so an accumulator doubles what it holds from one moment
to the next (Horner's rule),

    s ← 2·s + Σ weights of the spikes of this moment

An accumulator holds the sum of one output of one token over the columns that share a threshold and
a scale; it is doubled once less than its columns have moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikellm.kernels.spec import Segment
from spikellm.neurons import SoftResetNeuron
from spikellm.neurons.phase import places
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain
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


def doublings(neuron: SoftResetNeuron, steps: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Doublings of the accumulators of one output, in its segments together.

    Args:
        steps: T of every stored column, ``(…, in)``.

    Returns:
        int64 ``(…)``.
    """
    each = torch.stack([steps[..., part.start : part.stop].amax(-1) for part in segments])
    return (moments_of(neuron, each) - 1).clamp(min=0).sum(0)


def shifts_of_product(
    product: AttentionProduct, train: SpikeTrain, spikes: SpikingAttention
) -> int:
    """Doublings of the accumulators of one product of attention, one for each range of the part
    whose train drives it, of as many moments as its largest T asks for.
    """
    ranges = len(set(getattr(spikes.settings, train.part).group_ranges))
    moments = int(moments_of(train.neuron, train.steps.max()))
    return product.outputs * ranges * max(moments - 1, 0)
