"""Sums over tokens of numbers looked up by the size of codes, as counting spikes needs them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.base import choice, plain
from spikellm.kernels.native import backend, build

_FIELDS, _LARGEST = 4, (1 << 16) - 1  # of a word of the table
_ROWS = 4  # that are added up at once


class Lookup(NamedTuple):
    """A table of what is added for every size.

    Attributes:
        words: int64 ``(sizes,)``, the fields of a size side by side.
        fields: how many.
        largest: of all numbers.
        fits: whether fields are as few, and numbers as small, as the kernel needs them.
    """

    words: Tensor
    fields: int
    largest: int
    fits: bool

    @classmethod
    def of(cls, table: Tensor) -> Lookup:
        """Of integers ≥ 0, ``(sizes, fields)``."""
        fields, largest = table.shape[1], int(table.max()) if table.numel() else 0
        words = (table.long() << 16 * torch.arange(fields)).sum(1)
        return cls(words, fields, largest, fields <= _FIELDS and 0 < largest <= _LARGEST // _ROWS)


def sum_by_channel(
    codes: Tensor, baseline: Tensor | None, table: Lookup
) -> tuple[Tensor, Tensor] | None:
    """Sums of what a table holds for ``|q − z|``, and for ``|q|``, over all but channels.

    Args:
        codes: int32 or uint8 ``(…, channels)`` on the CPU.
        baseline: z, integers that broadcast to ``codes``; None for 0.
        table: of every size; 256 sizes where both are uint8.

    Returns:
        Two of int64 ``(channels, fields)``, the same tensor where z is 0; None where there are no
        native kernels or they cannot do it, so that torch has to.
    """
    if not (table.fits and plain(codes)) or choice() == "torch" or backend.problem() is not None:
        return None
    channels = codes.shape[-1]
    z = torch.zeros((), dtype=codes.dtype) if baseline is None else baseline
    dtype = torch.uint8 if codes.dtype == z.dtype == torch.uint8 else torch.int32
    rows, z = codes.to(dtype).reshape(-1, channels).contiguous(), z.to(dtype).expand(codes.shape)
    z = z if z.dim() == 2 else z.reshape(-1, channels)
    sums = torch.zeros(2, channels, _FIELDS, dtype=torch.int64)
    failed = build.load_library().spikellm_sum_by_channel(
        rows.data_ptr(),
        *rows.shape,
        z.data_ptr(),
        *z.stride(),
        table.words.data_ptr(),
        len(table.words),
        _LARGEST // table.largest,
        sums.data_ptr(),
        int(dtype == torch.uint8),
    )
    if failed:
        return None
    first, second = sums[..., : table.fields].unbind(0)
    return first, first if baseline is None else second
