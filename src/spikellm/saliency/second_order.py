"""Second-order saliency of weights (SpikeLLM §3.2, after OBS and GPTQ): the cost of removing a
weight when the other weights may compensate for it.

S_ij = w_ij² / [H⁻¹]_jj²,   H = 2 XᵀX + λI;   score of column j = Σ_i S_ij
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.saliency.base import Evidence, ranks

_DAMPING = 0.01  # of the mean diagonal of H, as GPTQ has it


@ranks("second-order")
def second_order(evidence: Evidence) -> Tensor:
    """Column scores, float64, ``(in,)``. Channels that never fire score 0."""
    x = evidence.x.double()
    hessian = 2 * x.T @ x
    diagonal = hessian.diagonal()
    damping = float(_DAMPING * diagonal.mean()) or 1.0
    inverse = torch.linalg.inv(
        hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    )
    scores: Tensor = evidence.column_energy.double() / inverse.diagonal().square() * (diagonal > 0)
    return scores
