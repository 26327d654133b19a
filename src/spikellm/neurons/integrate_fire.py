"""IF: the integrate-and-fire neuron with soft reset (SpikeLLM, §2).

    v(t) = v(t−1) + I(t) − θ·s(t−1),   s(t) = 1[v(t) ≥ θ]

One binary spike a step; with ``v(0) = θ/2`` and a constant current ``x/T`` it counts
``clip(floor(x/θ + 1/2), 0, T)``.
"""

from __future__ import annotations

from spikellm.neurons.base import SoftResetNeuron, neurons


@neurons.register("if")
def integrate_fire(bits: int = 1) -> SoftResetNeuron:
    """IF neuron; its spike has one bit."""
    if bits != 1:
        raise ValueError(
            f"an IF neuron emits 1-bit spikes, not {bits}-bit ones; use 'gif' for more levels a"
            " step"
        )
    return SoftResetNeuron(levels=1)
