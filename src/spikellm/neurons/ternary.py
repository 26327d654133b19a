"""Ternary GIF: a positive and a negative IF neuron merged (SpikeLLM, Remark 1).

    s(t) ∈ {−1, 0, +1};  T steps code ``−T … T``

Every step adds, skips or subtracts, so a product with ternary spikes needs additions only. A spike
takes 2 bits. Its baseline is 0.
"""

from __future__ import annotations

from spikellm.neurons.base import SoftResetNeuron, neurons


@neurons.register("ternary")
def ternary(bits: int = 2) -> SoftResetNeuron:
    """Ternary GIF neuron; its spike takes two bits."""
    if bits != 2:
        raise ValueError(f"a ternary spike takes 2 bits, not {bits}")
    return SoftResetNeuron(levels=1, signed=True)
