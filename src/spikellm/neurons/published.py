"""GIF with the top code of the authors' published code: ``2**(bits + log2 T) − 1`` (31 for T = 2 at
4 bits) instead of T·L (30).

No train of T spikes of at most L reaches that code, so this neuron has a merged mode only. It is
for comparison with published figures, not for running spikes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from spikellm.neurons.base import Drive, SoftResetNeuron, Steps, Trace, neurons

_MERGED_ONLY = (
    "gif-published has codes that no train of spikes reaches, so it runs in merged execution only;"
    " use gif"
)


@dataclass(frozen=True)
class PublishedNeuron(SoftResetNeuron):
    """A soft-reset neuron with codes that no spike train reaches.

    Methods that unroll a code raise ValueError.
    """

    unrolls: bool = False

    def top(self, steps: Steps) -> Steps:
        """Largest code, T·(L + 1) − 1."""
        return steps * (self.levels + 1) - 1

    def iterate_stepped(self, count: Tensor, steps: Steps = 1) -> Iterator[Tensor]:
        raise ValueError(_MERGED_ONLY)

    def iterate_phase(self, count: Tensor, steps: Steps = 1) -> Iterator[tuple[Tensor, int]]:
        raise ValueError(_MERGED_ONLY)

    def simulate(
        self,
        current: Tensor,
        theta: Tensor,
        baseline: Tensor,
        steps: Steps = 1,
        drive: Drive = "drain",
    ) -> Trace:
        raise ValueError(_MERGED_ONLY)

    def simulate_phase(
        self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps = 1
    ) -> Trace:
        raise ValueError(_MERGED_ONLY)


@neurons.register("gif-published")
def gif_published(bits: int) -> SoftResetNeuron:
    """GIF neuron that emits spikes of ``bits`` bits (1 to 8), merged mode only."""
    if not 1 <= bits <= 8:
        raise ValueError(f"a GIF neuron emits spikes of 1 to 8 bits, not {bits}")
    return PublishedNeuron(levels=2**bits - 1)
