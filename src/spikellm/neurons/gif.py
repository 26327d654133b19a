"""GIF: the generalized integrate-and-fire neuron (SpikeLLM, §3.1), which merges L IF steps into
one.

    s(t) = clip(floor(v(t)/θ), 0, L),   v ← v − θ·s(t),   L = 2**bits − 1

T steps code ``0 … T·L``. The top code is T·L, not ``2**(bits + log2 T) − 1``, which T spikes do not
reach.
"""

from __future__ import annotations

from spikellm.neurons.base import SoftResetNeuron, neurons


@neurons.register("gif")
def gif(bits: int) -> SoftResetNeuron:
    """GIF neuron that emits spikes of ``bits`` bits (1 to 8)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"a GIF neuron emits spikes of 1 to 8 bits, not {bits}")
    return SoftResetNeuron(levels=2**bits - 1)
