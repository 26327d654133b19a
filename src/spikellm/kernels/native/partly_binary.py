"""Partly binary weights on inputs that are not coded.

Few tokens take the kernel that decodes a row where it meets them. For many, rows are decoded once,
some at a time, for a matrix product of the library.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.kernels.native import build, ops
from spikellm.kernels.native.linear import NativeLayer, float_bias
from spikellm.kernels.native.strips import multiply_strips
from spikellm.kernels.prepared import LinearWeights, Observed
from spikellm.kernels.spec import LinearSpec

MOST_TOKENS = 16
"""Tokens up to which decoding a row where it is used is faster."""

_LANES = 16
_SAVED = (
    "salient_mask",
    "signs",
    "salient_codes",
    "weight_scale",
    "salient_scale",
    "salient_zero",
)
_BITS = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)

_library = torch.library.Library("spikellm", "FRAGMENT")
_library.define(
    "partly_binary_linear(Tensor x, Tensor head, Tensor mask, Tensor signs, Tensor codes, Tensor"
    " first, Tensor scale, Tensor salient_scale, Tensor salient_zero, Tensor? bias) -> Tensor"
)


def _linear(x: Tensor, head: Tensor, *stored: Tensor) -> Tensor:
    """``spikellm::partly_binary_linear``: see ``native/partly_binary.c``.

    Args:
        x: float32 or bfloat16, ``(tokens, in)``.
        head, *stored: operands of :class:`NativePartlyBinary`, bias last.

    Returns:
        ``(tokens, out)`` in the type of ``x``: as in torch up to rounding; up to ``MOST_TOKENS``
        tokens the same bits on every level.
    """
    if x.shape[0] > MOST_TOKENS:
        return _many(x, head, *stored)
    x = x.contiguous()
    y = x.new_empty(x.shape[0], stored[0].shape[0])
    failed = build.load_library().spikellm_partly_binary_linear(
        x.data_ptr(),
        x.shape[0],
        head.data_ptr(),
        *map(ops.pointer, stored),
        y.data_ptr(),
        ops.TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return ops.unless(failed, y)


def _many(x: Tensor, head: Tensor, *stored: Tensor) -> Tensor:
    """The same for many tokens."""
    *weights, bias = stored
    pointers = [one.data_ptr() for one in (head, *weights)]
    kernel, threads = build.load_library().spikellm_partly_binary_strip, torch.get_num_threads()

    def decode(first: int, own: Tensor) -> None:
        kernel(*pointers, first, len(own), own.data_ptr(), threads)

    def end(sums: Tensor, part: slice) -> Tensor:
        return sums if bias is None else sums.add_(bias[part])

    inputs = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % _LANES))
    return multiply_strips(inputs, x.new_empty(len(x), len(weights[0])), decode, end)


_library.impl("partly_binary_linear", _linear, "CPU")
torch.library.register_fake(
    "spikellm::partly_binary_linear",
    lambda x, head, mask, *_: x.new_empty(x.shape[0], mask.shape[0]),
)


class NativePartlyBinary(NativeLayer):
    """Partly binary weights, read as they are saved.

    Attributes:
        operands: int32 header (inputs, outputs, groups, bytes of a row of bits, then the columns of
            every group), mask, signs and codes as saved, int64 first code of every row, scales of
            binary weights, scale and zero-point of salient ones, bias.
    """

    most_tokens = MOST_TOKENS

    def __init__(self, library: ctypes.CDLL, spec: LinearSpec, weights: LinearWeights) -> None:
        mask, signs, codes, scale, salient_scale, salient_zero = map(weights.get_buffer, _SAVED)
        counts = torch.zeros(spec.rows + 1, dtype=torch.int64)
        counts[1:] = _marked(mask, spec.columns).cumsum(0)
        if int(counts[-1]) != len(codes):
            raise RequestError(f"{len(codes)} codes for {int(counts[-1])} salient weights")
        self.operands = (
            _head(spec, mask.shape[1]),
            *(one.contiguous() for one in (mask, signs, codes)),
            counts,
            *(one.float().contiguous() for one in (scale, salient_scale)),
            salient_zero.contiguous(),
            float_bias(weights),
        )
        super().__init__(library.spikellm_partly_binary_linear, spec, list(self.operands))

    def _operate(self, tokens: Tensor) -> Observed:
        return Observed(torch.ops.spikellm.partly_binary_linear.default(tokens, *self.operands))


def _marked(mask: Tensor, columns: int) -> Tensor:
    """Bits that are set in every row, of those that stand for columns."""
    mask = mask.clone()
    mask[:, -1] &= 0xFF >> (-columns % 8)
    return _BITS[mask.int()].sum(1, dtype=torch.int64)


def _head(spec: LinearSpec, row_bytes: int) -> Tensor:
    bounds = [place for s in spec.segments for place in (s.start, s.stop)]
    header = [spec.columns, spec.rows, len(spec.segments), row_bytes, spec.scales]
    return torch.tensor([*header, *bounds], dtype=torch.int32)
