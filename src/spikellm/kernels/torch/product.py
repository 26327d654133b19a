"""Reference kernels in plain torch. Every other kernel must equal these in integers."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_FLOAT32 = 2**24
_EXACT_FLOAT64 = 2**53


def integer_product(codes: Tensor, weights: Tensor, largest: int) -> Tensor:
    """``codes @ weightsᵀ``, exact.

    The product runs in floating point, in a type in which no partial sum can round, so that it is
    exact in any order of summation and fast on every device.

    Args:
        codes: integers in any dtype, ``(rows, in)``.
        weights: integers in any dtype, ``(out, in)``.
        largest: bound of ``Σ |code·weight|`` over one row and column.

    Returns:
        Integers as float32 or float64, ``(rows, out)``.
    """
    if largest > _EXACT_FLOAT64:
        raise OverflowError(f"sums up to {largest} are not exact in float64 (2**53)")
    dtype = torch.float32 if largest <= _EXACT_FLOAT32 and _float32_is_exact() else torch.float64
    with torch.autocast(codes.device.type, enabled=False):
        return codes.to(dtype) @ weights.to(dtype).T


def sum_of_chosen(x: Tensor, chosen: Tensor) -> Tensor:
    """Sums of inputs, by additions alone.

    Args:
        x: ``(tokens, in)``, floating point.
        chosen: bool, ``(out, in)``: which inputs each output adds up.

    Returns:
        ``(tokens, out)``.
    """
    counts = chosen.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    columns = chosen.nonzero()[:, 1]
    return torch.nn.functional.embedding_bag(columns, x.T.contiguous(), offsets, mode="sum").T


def _float32_is_exact() -> bool:
    """Whether products of float32 matrices are carried out in float32, not in a shorter type that
    the user chose for speed.
    """
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except (
        RuntimeError
    ):  # set through torch's newer interface, which this question cannot be asked of
        return False
