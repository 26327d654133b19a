"""Weights as PB-LLM has them (Shang et al., ICLR 2024): most are ±α, a few salient ones keep 8
bits. A baseline.

Which weights are salient is a bit mask over the whole matrix, so a layer takes 2 bits a weight and
8 bits more for each salient one; PB-LLM counts 1 step for a binary weight and 8 for a salient one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.kernels.prepared import PackedCodes
from spikellm.nn.formats.base import Buffer, LayerShape, Stored, WeightFormat, register
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.packing import pack, packed_length, unpack


class PartlyBinaryWeights(NamedTuple):
    """Codes of a partly binary weight matrix.

    Attributes:
        salient: bool, ``(out, in)``.
        positive: bool, ``(out, in)``: sign of a binary weight.
        scale: α, float32, ``(out, groups)``.
        codes: uint8, ``(out, in)``, used where salient.
        salient_scale, salient_zero: ``(out, 1)``, float32 and uint8.
    """

    salient: Tensor
    positive: Tensor
    scale: Tensor
    codes: Tensor
    salient_scale: Tensor
    salient_zero: Tensor


@register
class PartlyBinaryFormat(WeightFormat):
    """Buffers: ``salient_mask``, ``signs`` (uint8, one bit a weight, ``(out, bytes)``),
    ``salient_codes`` (uint8, one byte for each salient weight, row by row), ``weight_scale``
    ``(out, groups)``, ``salient_scale`` and ``salient_zero`` ``(out, 1)``.

    The one size is how many weights are salient.
    """

    name = "partly-binary"
    coding = "partly-binary"
    integer_form = "partly-binary"

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        rows, packed, byte = shape.rows, packed_length(shape.columns, 1), torch.uint8
        groups = most_weight_groups(shape.columns, shape.settings)
        return [
            Buffer("salient_mask", (rows, packed), byte, 0),
            Buffer("signs", (rows, packed), byte, 0),
            Buffer("salient_codes", shape.sizes or (0,), byte, 0),
            Buffer("weight_scale", (rows, groups), torch.float32, 1),
            Buffer("salient_scale", (rows, 1), torch.float32, 1),
            Buffer("salient_zero", (rows, 1), byte, 0),
        ]

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (state["salient_codes"].shape[0],)

    def fitted_sizes(
        self, weights: PartlyBinaryWeights, column_steps: Tensor | None
    ) -> tuple[int, ...]:
        return (int(weights.salient.sum()),)

    def salient_share(self, layer: Stored) -> float:
        """Share of weights with 8 bits."""
        salient = layer.get_buffer("salient_codes").shape[0]
        return salient / (layer.shape.columns * layer.shape.rows)

    def additive_share(self, layer: Stored) -> float:
        return 1.0 - self.salient_share(layer)

    def average_steps(self, layer: Stored) -> float:
        """As PB-LLM counts: 1 for a binary weight, one a bit for a salient one."""
        return 1.0 + (layer.shape.settings.weights.bits - 1) * self.salient_share(layer)

    def products(self, layer: Stored, steps: float) -> dict[int, float]:
        share = self.salient_share(layer)
        return {1: 1 - share, layer.shape.settings.weights.bits: share}

    def write(self, layer: Stored, weights: PartlyBinaryWeights) -> None:
        layer.get_buffer("salient_mask").copy_(pack(weights.salient.to(torch.uint8), 1))
        layer.get_buffer("signs").copy_(pack(weights.positive.to(torch.uint8), 1))
        layer.get_buffer("salient_codes").copy_(weights.codes[weights.salient])
        layer.weight_scale[:, : weights.scale.shape[1]] = weights.scale
        layer.get_buffer("salient_scale").copy_(weights.salient_scale)
        layer.get_buffer("salient_zero").copy_(weights.salient_zero)

    def integer_weights(self, layer: Stored, rows: slice) -> Tensor:
        raise RequestError(
            "a partly binary layer has no integer form: its binary and its 8-bit weights have"
            " scales of their own"
        )

    def kernel_bits(self, layer: Stored) -> int:
        return 0

    def packed_codes(self, layer: Stored) -> PackedCodes:
        raise RequestError("a partly binary layer has no codes of one width")

    def dense_weight(self, layer: Stored) -> Tensor:
        weight = 2 * self._bits(layer, "signs").float() - 1
        for group, (start, stop) in enumerate(layer.layout().weight_groups):
            weight[:, start:stop] *= layer.weight_scale[:, group : group + 1]
        mask = self._bits(layer, "salient_mask").bool()
        rows = mask.nonzero()[:, 0]
        zero = layer.get_buffer("salient_zero")[rows, 0].float()
        codes, scale = layer.get_buffer("salient_codes"), layer.get_buffer("salient_scale")
        weight[mask] = (codes.float() - zero) * scale[rows, 0]
        return weight

    def validation_error(self, layer: Stored) -> str | None:
        salient = int(self._bits(layer, "salient_mask").sum(dtype=torch.int64))
        codes, scale = layer.get_buffer("salient_codes"), layer.get_buffer("salient_scale")
        if salient != codes.shape[0]:
            return (
                f"salient_mask marks {salient} weights, and there are {codes.shape[0]} codes for"
                " them"
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            return "salient_scale holds values that are not finite and positive"
        return None

    @staticmethod
    def _bits(layer: Stored, name: str) -> Tensor:
        return unpack(layer.get_buffer(name), 1, layer.shape.columns)
