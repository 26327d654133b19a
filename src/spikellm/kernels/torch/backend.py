"""The reference backend: plain torch, for everything and everywhere. Every other backend must
equal it in integers.
"""

from __future__ import annotations

from spikellm.kernels.base import REFERENCE, Backend, register
from spikellm.kernels.prepared import LinearWeights, Transform
from spikellm.kernels.spec import HeadSpec, LinearSpec, MixSpec, RowSpec, Spec
from spikellm.kernels.torch.heads import TorchHeads
from spikellm.kernels.torch.linear import TorchLinear
from spikellm.kernels.torch.rows import TorchRows
from spikellm.kernels.torch.shifting import ShiftingLinear, shifts
from spikellm.quantization.hadamard import mix


@register
class TorchBackend(Backend):
    """Runs stepped and binary execution, compiled models and every device."""

    name = REFERENCE
    preference = 0

    def supports(self, spec: Spec) -> str | None:
        of_planes = isinstance(spec, LinearSpec) and bool(spec.planes)
        return "it runs planes one after the other" if of_planes else None

    def prepare_linear(self, spec: LinearSpec, weights: LinearWeights) -> TorchLinear:
        return (ShiftingLinear if shifts(spec) else TorchLinear)(spec, weights)

    def prepare_heads(self, spec: HeadSpec) -> TorchHeads:
        return TorchHeads(spec)

    def prepare_rows(self, spec: RowSpec, weights: LinearWeights) -> TorchRows:
        return TorchRows(spec.weights, weights)

    def prepare_mix(self, spec: MixSpec) -> Transform:
        return mix
