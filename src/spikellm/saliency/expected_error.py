"""Expected-error saliency: the measured loss of coding a channel, ``E[δ_c²]·‖W[:,c]‖²``, which is
the diagonal of the second-order term ``½ tr(δ WᵀW δᵀ)``.

δ is measured with the ordinary number of steps and one range for all channels; T steps would remove
about ``1 − 1/T²`` of it.
"""

from __future__ import annotations

from torch import Tensor

from spikellm.quantization.thresholds import coded_range, threshold_for_range
from spikellm.saliency.base import Evidence, ranks


@ranks("expected-error")
def expected_error(evidence: Evidence) -> Tensor:
    """Measured mean squared coding error of each channel times the energy of its weight column."""
    neuron = evidence.neuron
    theta, baseline = threshold_for_range(
        *coded_range(evidence.x, evidence.share, evidence.source),
        neuron.top(evidence.steps),
        symmetric=evidence.symmetric,
        signed=neuron.signed,
    )
    coded = neuron.decode(
        neuron.encode(evidence.x, theta, baseline, evidence.steps), theta, baseline
    )
    return (evidence.x - coded).square().mean(0) * evidence.column_energy
