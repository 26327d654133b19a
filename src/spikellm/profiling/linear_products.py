"""What a spiking linear layer executes of its products."""

from __future__ import annotations

from spikellm.nn.hooks import SpikeTrain
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.counts import DENSE_BITS


def products_of(
    layer: SpikingLinear, train: SpikeTrain | None = None
) -> dict[tuple[int, int], float]:
    """Multiply-accumulates executed for each of the original ones, by bits of input and weight.

    Args:
        train: spikes of its inputs, if massive tokens among them are to be counted; otherwise there
            are as many as in the calibration text.
    """
    activations = layer.settings.activations
    a = activations.bits if activations.spiking else DENSE_BITS
    steps = layer.average_steps
    if train is not None and layer.massive is not None:
        steps = layer.mean_steps(train.steps)
    products = layer.format.products(layer, steps)
    return {(a, bits): share for bits, share in products.items()}
