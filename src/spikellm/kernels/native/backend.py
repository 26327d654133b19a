"""The native backend: kernels in C on the CPU, the same integers as in torch.

What is prepared holds pointers into tensors that it keeps alive; a call reads no environment, looks
no buffer up and casts nothing. Where a dispatch mode is on, or ``x`` is no plain tensor, the call
goes through the operators of :mod:`spikellm.kernels.native.ops`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import CDLL
from functools import cache

import torch
from torch import Tensor

from spikellm.core.errors import DependencyError
from spikellm.kernels.base import Backend, choice, plain, register
from spikellm.kernels.native import build, ops
from spikellm.kernels.native.head_plan import head_misfit, make_head_plan
from spikellm.kernels.native.linear import NativeAdditive, NativeLayer, NativeLinear
from spikellm.kernels.native.linear_plan import misfit
from spikellm.kernels.native.partly_binary import NativePartlyBinary
from spikellm.kernels.native.rotation import NativeRotation
from spikellm.kernels.native.weight_only import NativeRows, NativeWeightOnly
from spikellm.kernels.native.weight_only_plan import weight_only_misfit
from spikellm.kernels.prepared import LinearWeights, Transform
from spikellm.kernels.spec import HeadSpec, IntegerForm, LinearSpec, MixSpec, RowSpec, Spec
from spikellm.quantization import hadamard

_log = logging.getLogger("spikellm")


_UNCODED: dict[IntegerForm, Callable[[CDLL, LinearSpec, LinearWeights], NativeLayer]] = {
    "affine": NativeWeightOnly,
    "ternary": NativeAdditive,
    "planes": NativeAdditive,
    "partly-binary": NativePartlyBinary,
}


@register
class NativeBackend(Backend):
    """Merged execution on the CPU, without gradients."""

    name = "native"
    preference = 10
    devices = frozenset({"cpu"})

    def missing(self) -> str | None:
        return problem()

    def supports(self, spec: Spec) -> str | None:
        if isinstance(spec, HeadSpec):
            return head_misfit(spec)
        if isinstance(spec, MixSpec):
            return None
        if isinstance(spec, RowSpec):
            return weight_only_misfit(spec.weights)
        if spec.execution != "merged":
            return f"it runs merged spikes, not {spec.execution} ones"
        if spec.neuron is not None:
            return misfit(spec)
        own_kernel = spec.weights in ("ternary", "planes", "partly-binary")
        return None if own_kernel else weight_only_misfit(spec)

    def prepare_linear(self, spec: LinearSpec, weights: LinearWeights) -> NativeLayer:
        kind = NativeLinear if spec.neuron is not None else _UNCODED[spec.weights]
        return kind(build.load_library(), spec, weights)

    def prepare_rows(self, spec: RowSpec, weights: LinearWeights) -> NativeRows:
        return NativeRows(spec.weights, weights)

    def prepare_heads(self, spec: HeadSpec) -> NativeHeads:
        return NativeHeads(spec)

    def prepare_mix(self, spec: MixSpec) -> Transform:
        return native_mix

    def prepare_rotation(self, signs: Tensor, offset: Tensor | None) -> NativeRotation:
        return NativeRotation(signs, offset)

    def describe(self) -> str:
        return f"native, {build.level_of(build.load_library())}"


@cache
def problem() -> str | None:
    """Why there are no native kernels; None if there are. Said once where nobody asked for them."""
    try:
        build.load_library()
    except DependencyError as error:
        if choice() == "auto":
            _log.warning("spikellm: native kernels are off, torch is used instead: %s", error)
        return str(error)
    return None


class NativeHeads:
    """A coder of heads that codes in one pass, and takes products with packed rows without ever
    unpacking them as a whole.

    Attributes:
        plan: see :mod:`spikellm.kernels.native.head_plan`.
        most_queries: for more new tokens, unpacking once and a matrix product are faster.
    """

    most_queries = 16

    def __init__(self, spec: HeadSpec) -> None:
        library = build.load_library()
        self.plan = make_head_plan(spec)
        self._channels, self._row_bytes = spec.channels, spec.row_bytes(spec.channels)
        self._code = library.spikellm_code_heads
        self._scores, self._sums = library.spikellm_key_scores, library.spikellm_value_sums

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :class:`spikellm.kernels.prepared.PreparedHeads`, as for the methods below."""
        return self._run(x.float(), 0)

    def to_rows(self, x: Tensor) -> Tensor:
        return self._run(x.float(), self._row_bytes)

    def _run(self, x: Tensor, row_bytes: int) -> Tensor:
        if plain(x):
            return ops.call_code_heads(self._code, x, self.plan, row_bytes)
        found: Tensor = ops.code_heads(x, self.plan, row_bytes)
        return found

    def key_scores(self, query: Tensor, rows: Tensor) -> Tensor:
        if plain(query):
            return ops.call_with_rows(self._scores, query, rows, self.plan, rows.shape[2])
        found: Tensor = ops.key_scores(query, rows, self.plan)
        return found

    def value_sums(self, weights: Tensor, rows: Tensor) -> Tensor:
        if plain(weights):
            return ops.call_with_rows(self._sums, weights, rows, self.plan, self._channels)
        found: Tensor = ops.value_sums(weights, rows, self.plan, self._channels)
        return found


def native_mix(x: Tensor) -> Tensor:
    """:func:`spikellm.quantization.hadamard.mix`; the kernel takes float32 and float64."""
    if x.dtype not in (torch.float32, torch.float64):
        return hadamard.mix(x)
    found: Tensor = ops.call_mix(x) if plain(x) and x.is_cpu else ops.mix(x)
    return found
