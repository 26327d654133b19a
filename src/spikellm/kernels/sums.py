"""Sums over tokens of numbers looked up by the size of codes, as counting spikes needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.base import choice, plain
from spikellm.kernels.native import backend, build

_FIELDS, _LARGEST = 4, (1 << 16) - 1  # of a word of the table
_ROWS = 4  # that are added up at once


def sum_by_channel(
    codes: Tensor, baseline: Tensor | None, table: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Sums of what a table holds for ``|q − z|``, and for ``|q|``, over all but channels.

    Args:
        codes: int32 or uint8 ``(…, channels)`` on the CPU.
        baseline: z, integers that broadcast to ``codes``; None for 0.
        table: of every size, integers ≥ 0, ``(sizes, fields)``; 256 sizes where both are uint8.

    Returns:
        Two of int64 ``(channels, fields)``, the same tensor where z is 0; None where there are no
        native kernels or they cannot do it, so that torch has to.
    """
    largest = int(table.max()) if table.numel() else 0
    fits = table.shape[1] <= _FIELDS and 0 < largest <= _LARGEST // _ROWS
    if not fits or not plain(codes) or choice() == "torch" or backend.problem() is not None:
        return None
    channels = codes.shape[-1]
    z = torch.zeros((), dtype=codes.dtype) if baseline is None else baseline
    dtype = torch.uint8 if codes.dtype == z.dtype == torch.uint8 else torch.int32
    rows, z = codes.to(dtype).reshape(-1, channels).contiguous(), z.to(dtype).expand(codes.shape)
    z = z if z.dim() == 2 else z.reshape(-1, channels)
    words = (table.long() << 16 * torch.arange(table.shape[1])).sum(1)
    sums = torch.zeros(2, channels, _FIELDS, dtype=torch.int64)
    failed = build.load_library().spikellm_sum_by_channel(
        rows.data_ptr(),
        *rows.shape,
        z.data_ptr(),
        *z.stride(),
        words.data_ptr(),
        len(words),
        _LARGEST // largest,
        sums.data_ptr(),
        int(dtype == torch.uint8),
    )
    if failed:
        return None
    first, second = sums[..., : table.shape[1]].unbind(0)
    return first, first if baseline is None else second
