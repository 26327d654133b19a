"""GIF with the top code of the authors' published code: ``2**(bits + log2 T) − 1`` (31 for T = 2 at
4 bits) instead of T·L (30).

No train of T spikes of at most L reaches that code, so this neuron has a merged mode only. It is
for comparison with published figures, not for running spikes.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikellm.neurons.base import SoftResetNeuron, Steps, neurons


@dataclass(frozen=True)
class PublishedNeuron(SoftResetNeuron):
    """A soft-reset neuron with codes that no spike train reaches, so that what unrolls a code
    raises ValueError.
    """

    unrolls: bool = False

    def top(self, steps: Steps) -> Steps:
        """Largest code, T·(L + 1) − 1."""
        return steps * (self.levels + 1) - 1


@neurons.register("gif-published")
def gif_published(bits: int) -> SoftResetNeuron:
    """GIF neuron that emits spikes of ``bits`` bits (1 to 8), merged mode only."""
    if not 1 <= bits <= 8:
        raise ValueError(f"a GIF neuron emits spikes of 1 to 8 bits, not {bits}")
    return PublishedNeuron(levels=2**bits - 1)
