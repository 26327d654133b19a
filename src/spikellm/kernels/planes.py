"""Layers whose weights are a sum of planes, each with scales of its own: every backend that runs
ternary layers of one step runs them, plane by plane, if it does not run them as they are.
"""

from __future__ import annotations

from torch import Tensor

from spikellm.kernels.base import Backend
from spikellm.kernels.prepared import LinearWeights, Observed, PreparedLinear
from spikellm.kernels.spec import LinearSpec


def prepare_layer(backend: Backend, spec: LinearSpec, weights: LinearWeights) -> PreparedLinear:
    """A layer that a backend supports, ready to run, of planes or not."""
    if not spec.planes or backend.supports(spec) is None:
        return backend.prepare_linear(spec, weights)
    plane = spec.of_plane()
    return SumOfPlanes(
        spec, [backend.prepare_linear(plane, one) for one in weights.planes()], weights.bias
    )


class SumOfPlanes:
    """Outputs of planes in float32, added up in their order.

    Args:
        planes: prepared, without a bias.
        bias: of the layer.
    """

    def __init__(self, spec: LinearSpec, planes: list[PreparedLinear], bias: Tensor | None) -> None:
        self.spec, self._planes, self._bias = spec, planes, bias

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        total = self._planes[0](wide)
        for plane in self._planes[1:]:
            total = total + plane(wide)
        return self._finished(total, x)

    def observed(self, x: Tensor) -> Observed:
        """The same, with codes, which all planes have in common."""
        wide = x.float()
        total, codes, baseline = self._planes[0].observed(wide)
        for plane in self._planes[1:]:
            total = total + plane(wide)
        return Observed(self._finished(total, x), codes, baseline)

    def _finished(self, total: Tensor, x: Tensor) -> Tensor:
        return (total if self._bias is None else total + self._bias.float()).to(x.dtype)
