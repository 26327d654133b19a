"""The Triton backend: merged execution on a GPU, the same integers as in torch."""

from __future__ import annotations

import torch

from spikellm.kernels.base import Backend, register
from spikellm.kernels.native.head_plan import head_misfit
from spikellm.kernels.native.linear_plan import misfit
from spikellm.kernels.placing import packed_misfit
from spikellm.kernels.prepared import LinearWeights, PreparedHeads, PreparedLinear, Transform
from spikellm.kernels.spec import HeadSpec, LinearSpec, MixSpec, RowSpec, Spec
from spikellm.kernels.triton.presence import interpreting, problem

_MOST_MIXED = 1 << 15  # channels of a row that a program holds


@register
class TritonBackend(Backend):
    """Layers, coding of heads and rotations on CUDA devices; the rest there goes through torch."""

    name = "triton"
    preference = 5
    devices = frozenset({"cuda", "cpu"}) if interpreting() else frozenset({"cuda"})

    def missing(self) -> str | None:
        return problem()

    def supports(self, spec: Spec) -> str | None:
        if isinstance(spec, MixSpec):
            return None if spec.channels <= _MOST_MIXED else "its rows are too long for a program"
        if isinstance(spec, HeadSpec):
            return head_misfit(spec) or coding_misfit(spec)
        if isinstance(spec, RowSpec):
            return "rows are looked up in torch"
        if spec.execution != "merged":
            return f"it runs merged spikes, not {spec.execution} ones"
        if spec.neuron is None:
            known = spec.has_integers
            return packed_misfit(spec) if known else "its weights have no integer form"
        return misfit(spec) or coding_misfit(spec)

    def prepare_linear(self, spec: LinearSpec, weights: LinearWeights) -> PreparedLinear:
        from spikellm.kernels.triton.linear import TritonLinear, TritonWeightOnly

        return (TritonWeightOnly if spec.neuron is None else TritonLinear)(spec, weights)

    def prepare_heads(self, spec: HeadSpec) -> PreparedHeads:
        from spikellm.kernels.triton.heads import TritonHeads

        return TritonHeads(spec)

    def prepare_mix(self, spec: MixSpec) -> Transform:
        from spikellm.kernels.triton.rotation import rotated

        return rotated

    def describe(self) -> str:
        import triton

        where = "interpreted" if interpreting() else torch.cuda.get_device_name()
        return f"triton {triton.__version__}, {where}"


def coding_misfit(spec: LinearSpec | HeadSpec) -> str | None:
    """Why kernels cannot code so; None if they can."""
    neuron = spec.neuron
    if neuron is not None and (neuron.price != 0 or neuron.levels_of(1) is not None):
        return "its spikes have a price, or levels of their own"
    if spec.threshold_source == "mean":
        return "its thresholds follow the mean magnitude"
    if spec.threshold_source == "calibration":
        return "its thresholds are constants"
    return None
