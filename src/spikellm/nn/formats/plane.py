"""One plane of weights that are a sum of planes, as kernels see it: a ternary layer of one step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spikellm.kernels.prepared import PackedCodes
from spikellm.nn.formats.base import Stored, group_of_columns
from spikellm.nn.layout import Layout
from spikellm.quantization.packing import pack


class PlaneSource(Protocol):
    """The format of a layer that has planes."""

    def signs(self, layer: Stored, plane: int, rows: slice = ...) -> Tensor: ...

    def release(self, layer: Stored) -> None: ...


class Plane:
    """See :class:`spikellm.kernels.prepared.LinearWeights`; the layer adds its bias itself.

    Args:
        layer: whose plane it is.
        number: of the plane.
        weight_scale: of its groups, ``(out, weight groups)``.
    """

    bias = None

    def __init__(
        self, source: PlaneSource, layer: Stored, number: int, weight_scale: Tensor
    ) -> None:
        self._source, self._layer, self.number = source, layer, number
        self.weight_scale = weight_scale

    def integer_weights(self, rows: slice = slice(None)) -> Tensor:
        """−1, 0 and 1, int16 ``(out, in)`` in stored order."""
        return self._source.signs(self._layer, self.number, rows).to(torch.int16)

    def packed_codes(self) -> PackedCodes:
        """Codes of two bits about 1."""
        codes = (self._source.signs(self._layer, self.number) + 1).to(torch.uint8)
        zero = torch.ones_like(self.weight_scale, dtype=torch.uint8)
        return PackedCodes(pack(codes, 2), zero)

    def planes(self) -> list[Plane]:
        """The plane itself."""
        return [self]

    def dense_weight(self) -> Tensor:
        """Float32 ``(out, in)``, columns in their original order."""
        return scaled_sum([self], self._layer.layout())

    def get_buffer(self, target: str, /) -> Tensor:
        """What the layer saves under a name."""
        return self._layer.get_buffer(target)

    def release_codes(self) -> None:
        """Say that a backend has a layout of its own."""
        self._source.release(self._layer)


def scaled_sum(planes: list[Plane], layout: Layout) -> Tensor:
    """The weight that planes stand for, float32 ``(out, in)``, columns in their original order."""
    group = group_of_columns(layout).to(planes[0].weight_scale.device)
    weight = torch.zeros(())
    for plane in planes:
        weight = plane.integer_weights().float() * plane.weight_scale.float()[:, group] + weight
    if layout.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, layout.order, weight)
