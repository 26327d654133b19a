"""Reference kernels in plain torch. Every other kernel must equal these in integers."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_FLOAT32 = 2**24
_EXACT_FLOAT64 = 2**53


def integer_product(codes: Tensor, weights: Tensor, largest: int) -> Tensor:
    """``codes @ weightsᵀ``, exact.

    The product runs in floating point, in a type in which no partial sum can round, so that it is exact in any order of summation and fast on
    every device.

    Args:
        codes: integers in any dtype, ``(rows, in)``.
        weights: integers in any dtype, ``(out, in)``.
        largest: bound of ``Σ |code·weight|`` over one row and column.

    Returns:
        Integers as float32 or float64, ``(rows, out)``.
    """
    if largest > _EXACT_FLOAT64:
        raise OverflowError(f"sums up to {largest} are not exact in float64 (2**53)")
    # codes above 256 would round where float32 products may run in bfloat16 (torch.set_float32_matmul_precision)
    small = largest <= _EXACT_FLOAT32 and bool(torch.get_float32_matmul_precision() == "highest")
    dtype = torch.float32 if small else torch.float64
    return codes.to(dtype) @ weights.to(dtype).T
