"""Weights on inputs that are not coded: layers, and rows that are looked up.

Few tokens take the kernel that decodes weights in registers. For many, weights are decoded once,
some rows at a time, for a matrix product of the library.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spikellm.kernels.base import plain
from spikellm.kernels.native import build, ops
from spikellm.kernels.native.linear import NativeLayer, float_bias
from spikellm.kernels.native.strips import multiply_strips
from spikellm.kernels.native.weight_only_plan import PlacedPlan, make_weight_only_plan
from spikellm.kernels.prepared import LinearWeights, Observed
from spikellm.kernels.spec import LinearSpec

MOST_TOKENS = 20
"""Tokens up to which decoding in registers is faster."""

_NO_ROW = 2  # what the library answers where a row does not exist

_library = torch.library.Library("spikellm", "FRAGMENT")
_library.define(
    "weight_only_linear(Tensor x, Tensor plan, Tensor codes, Tensor scale, Tensor zero, Tensor?"
    " bias, Tensor order) -> Tensor"
)
_library.define(
    "weight_only_rows(Tensor rows, Tensor plan, Tensor codes, Tensor scale, Tensor zero, int"
    " columns, ScalarType dtype) -> Tensor"
)


def _linear(  # noqa: PLR0913  torch custom operators take tensors one by one
    x: Tensor,
    plan: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    order: Tensor,
) -> Tensor:
    """``spikellm::weight_only_linear``: a linear layer of integer weights on inputs that are not
    coded.

    See ``native/weight_only.c``.

    Args:
        x: float32 or bfloat16, ``(tokens, in)``.
        plan, order: see :class:`spikellm.kernels.native.weight_only_plan.PlacedPlan`.
        codes: uint8, packed, ``(out, bytes)``.
        scale, zero: float32 and uint8, ``(out, weight groups)``.
        bias: float32, ``(out,)``.

    Returns:
        ``(tokens, out)`` in the type of ``x``: as in torch up to rounding; up to ``MOST_TOKENS``
        tokens the same bits on every level, and where inputs are integers the same as in torch.
    """
    if x.shape[0] > MOST_TOKENS:
        return _many(x, plan, (codes, scale, zero), bias, order)
    x = x.contiguous()
    y = x.new_empty(x.shape[0], codes.shape[0])
    failed = build.load_library().spikellm_weight_only_linear(
        x.data_ptr(),
        x.shape[0],
        plan.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        ops.pointer(bias),
        y.data_ptr(),
        ops.TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return ops.unless(failed, y)


def _many(
    x: Tensor,
    plan: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    order: Tensor,
) -> Tensor:
    """The same for many tokens.

    Where a row has one scale, sums are of integers, and scaled; else scaled weights are summed.
    """
    codes, scale, zero = weights
    alone = scale.shape[1] == 1
    kernel, threads = build.load_library().spikellm_weight_only_strip, torch.get_num_threads()

    def decode(first: int, own: Tensor) -> None:
        kernel(
            plan.data_ptr(),
            codes.data_ptr(),
            None if alone else scale.data_ptr(),
            zero.data_ptr(),
            first,
            len(own),
            own.data_ptr(),
            threads,
        )

    def end(sums: Tensor, part: slice) -> Tensor:
        if alone:
            sums *= scale[part, 0]
        return sums if bias is None else sums.add_(bias[part])

    inputs = torch.nn.functional.pad(x.float(), (0, 1)).index_select(1, order)
    return multiply_strips(inputs, x.new_empty(len(x), len(codes)), decode, end)


def _rows(  # noqa: PLR0913  torch custom operators take tensors one by one
    rows: Tensor,
    plan: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """``spikellm::weight_only_rows``: rows of weights, int64 ``(count,)``, in the order of
    channels, ``(count, columns)``; the same bits as in torch.
    """
    rows = rows.contiguous()
    y = torch.empty(len(rows), columns, dtype=dtype)
    failed = build.load_library().spikellm_weight_only_rows(
        rows.data_ptr(),
        len(rows),
        plan.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        y.data_ptr(),
        ops.TYPES[dtype],
        torch.get_num_threads(),
    )
    if failed == _NO_ROW:
        raise IndexError(f"a row is looked up that is not there; expected 0 to {len(codes) - 1}")
    return ops.unless(failed, y)


_library.impl("weight_only_linear", _linear, "CPU")
_library.impl("weight_only_rows", _rows, "CPU")
torch.library.register_fake(
    "spikellm::weight_only_linear",
    lambda x, plan, codes, *_: x.new_empty(x.shape[0], codes.shape[0]),
)
torch.library.register_fake(
    "spikellm::weight_only_rows",
    lambda rows, plan, codes, scale, zero, columns, dtype: scale.new_empty(
        rows.shape[0], columns, dtype=dtype
    ),
)


class NativeWeightOnly(NativeLayer):
    """Integer weights on inputs that are not coded."""

    most_tokens = MOST_TOKENS

    def __init__(self, library: ctypes.CDLL, spec: LinearSpec, weights: LinearWeights) -> None:
        placed, codes, scale, zero = _operands(spec, weights)
        self.operands = (placed.plan, codes, scale, zero, float_bias(weights))
        self._order = placed.order
        super().__init__(library.spikellm_weight_only_linear, spec, list(self.operands))

    def _operate(self, tokens: Tensor) -> Observed:
        found = torch.ops.spikellm.weight_only_linear.default(tokens, *self.operands, self._order)
        return Observed(found)


class NativeRows:
    """Rows of integer weights, as :class:`spikellm.kernels.prepared.PreparedRows` says."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        placed, codes, scale, zero = _operands(spec, weights)
        self.operands, self._columns = (placed.plan, codes, scale, zero), spec.columns

    def __call__(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        own = dtype if dtype in ops.TYPES else torch.float32
        run = _rows if plain(rows) else torch.ops.spikellm.weight_only_rows.default
        plan, codes, scale, zero = self.operands
        found = run(rows.reshape(-1).long(), plan, codes, scale, zero, self._columns, own)
        return found.to(dtype).view(*rows.shape, self._columns)


def _operands(
    spec: LinearSpec, weights: LinearWeights
) -> tuple[PlacedPlan, Tensor, Tensor, Tensor]:
    codes, zero = weights.packed_codes()
    scale = weights.weight_scale.float().contiguous()
    return make_weight_only_plan(spec), codes.contiguous(), scale, zero.contiguous()
