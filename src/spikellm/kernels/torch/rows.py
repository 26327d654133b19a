"""Rows of integer weights that are looked up, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.prepared import LinearWeights
from spikellm.kernels.spec import LinearSpec
from spikellm.quantization.packing import unpack


class TorchRows:
    """Rows, each unpacked as it is looked up."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        self._spec, self._weights = spec, weights

    def __call__(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`spikellm.kernels.prepared.PreparedRows`."""
        spec, (packed, zero) = self._spec, self._weights.packed_codes()
        own = rows.reshape(-1).long()
        if not torch.compiler.is_compiling():
            self._require_there(own)
        codes = unpack(packed[own], spec.weight_bits, spec.columns).float()
        scale, zero = self._weights.weight_scale[own].float(), zero[own].float()
        for start, stop, _, group in spec.segments:
            codes[:, start:stop] -= zero[:, group : group + 1]
            codes[:, start:stop] *= scale[:, group : group + 1]
        if spec.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, spec.order, codes)
        return codes.to(dtype).view(*rows.shape, spec.columns)

    def _require_there(self, rows: Tensor) -> None:
        last = self._spec.rows - 1
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) <= last:
            raise IndexError(f"a row is looked up that is not there; expected 0 to {last}")
