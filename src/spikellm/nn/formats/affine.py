"""Integers with one scale and zero-point for each row and group of columns; columns that matter
may take several steps, so more bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.prepared import PackedCodes
from spikellm.nn.formats.base import (
    Buffer,
    LayerShape,
    Stored,
    WeightFormat,
    group_of_columns,
    register,
)
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.packing import pack, packed_length, unpack
from spikellm.saliency import salient_count

_ROWS = 1 << 21  # weights that are repacked at a time
SCALE_TYPES = {32: torch.float32, 16: torch.bfloat16}


@register
class AffineFormat(WeightFormat):
    """Buffers: ``weight_codes`` (uint8, packed, ``(out, bytes)``), ``weight_scale`` (float32,
    ``(out, weight groups)``) and ``weight_zero`` (uint8, the same shape). With scales of 16 bits
    ``weight_scale`` is in bfloat16, and zero-points are packed in as many bits as a code.

    Where columns take several steps also ``salient_codes`` (uint8, packed) and ``column_steps``
    (uint8, ``(in,)``).
    """

    name = "affine"

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        weights, salient = shape.settings.weights, self.salient_columns(shape)
        rows, byte = shape.rows, torch.uint8
        packed = packed_length(shape.columns - salient, weights.bits)
        found = [Buffer("weight_codes", (rows, packed), byte, 0)]
        if salient:
            packed = packed_length(salient, weights.salient_bits)
            found += [
                Buffer("salient_codes", (rows, packed), byte, 0),
                Buffer("column_steps", (shape.columns,), byte, 1),
            ]
        groups = most_weight_groups(
            shape.columns, shape.settings, 2 if salient else 1
        )  # unused ones stay 1 and 0
        return [
            *found,
            Buffer("weight_scale", (rows, groups), SCALE_TYPES[weights.scale_bits], 1),
            Buffer("weight_zero", (rows, self._zero_bytes(shape, groups)), byte, 0),
        ]

    def salient_columns(self, shape: LayerShape) -> int:
        return salient_count(shape.settings.weights.salient_rate, shape.columns)

    def column_steps(self, layer: Stored) -> Tensor | None:
        return layer.get_buffer("column_steps") if self.salient_columns(layer.shape) else None

    def write(self, layer: Stored, weights: AffineWeights) -> None:
        fine, bits = self._fine_columns(layer), layer.shape.settings.weights
        if fine is None:
            layer.get_buffer("weight_codes").copy_(pack(weights.codes, bits.bits))
        else:
            layer.get_buffer("weight_codes").copy_(pack(weights.codes[:, ~fine], bits.bits))
            layer.get_buffer("salient_codes").copy_(pack(weights.codes[:, fine], bits.salient_bits))
        used = weights.scale.shape[1]
        layer.weight_scale[:, :used] = weights.scale
        zero = torch.zeros_like(layer.weight_scale, dtype=torch.uint8)
        zero[:, :used] = weights.zero
        packed = zero if bits.scale_bits == 32 else pack(zero, self.kernel_bits(layer))
        layer.get_buffer("weight_zero").copy_(packed)

    def integer_weights(self, layer: Stored, rows: slice) -> Tensor:
        codes = self._codes(layer, rows).to(torch.int16)
        zero = self._zeros(layer)
        for group, (start, stop) in enumerate(layer.layout().weight_groups):
            codes[:, start:stop] -= zero[rows, group : group + 1]
        return codes

    def kernel_bits(self, layer: Stored) -> int:
        return self._widest(layer.shape)

    def _widest(self, shape: LayerShape) -> int:
        weights = shape.settings.weights
        return weights.salient_bits if self.salient_columns(shape) else weights.bits

    def packed_codes(self, layer: Stored) -> PackedCodes:
        zero = self._zeros(layer)
        if not self.salient_columns(layer.shape):
            return PackedCodes(layer.get_buffer("weight_codes"), zero)
        return PackedCodes(repacked(self, layer, zero), zero)

    def validation_error(self, layer: Stored) -> str | None:
        weights, salient = layer.shape.settings.weights, self.salient_columns(layer.shape)
        steps = self.column_steps(layer)
        if steps is not None and int((steps == weights.salient_steps).sum()) != salient:
            return (
                f"column_steps does not give {salient} columns {weights.salient_steps} steps, as"
                " the recipe says"
            )
        top = weights.top(weights.salient_steps)
        if int(self._zeros(layer).max()) > top:
            return f"weight_zero exceeds the largest code, {top}"
        return None

    def _zero_bytes(self, shape: LayerShape, groups: int) -> int:
        """Bytes that the zero-points of a row take."""
        weights = shape.settings.weights
        if weights.scale_bits == 32:
            return groups
        return packed_length(groups, self._widest(shape))

    def _zeros(self, layer: Stored) -> Tensor:
        """Zero-points, uint8 ``(out, weight groups)``."""
        stored = layer.get_buffer("weight_zero")
        if layer.shape.settings.weights.scale_bits == 32:
            return stored
        return unpack(stored, self.kernel_bits(layer), layer.weight_scale.shape[1])

    def _codes(self, layer: Stored, rows: slice) -> Tensor:
        settings, shape = layer.shape.settings.weights, layer.shape
        fine, salient = self._fine_columns(layer), self.salient_columns(shape)
        codes = unpack(
            layer.get_buffer("weight_codes")[rows], settings.bits, shape.columns - salient
        )
        if fine is None:
            return codes
        whole = codes.new_empty(len(codes), shape.columns)
        whole[:, ~fine] = codes
        whole[:, fine] = unpack(
            layer.get_buffer("salient_codes")[rows], settings.salient_bits, salient
        )
        return whole

    def _fine_columns(self, layer: Stored) -> Tensor | None:
        """Mask of stored columns whose weights take several steps; None if there are none."""
        steps = self.column_steps(layer)
        return None if steps is None else layer.stored(steps > 1)


def repacked(form: WeightFormat, layer: Stored, zero: Tensor) -> Tensor:
    """Codes ``integer + zero`` of ``kernel_bits`` bits, packed, some outputs at a time."""
    columns, rows = layer.shape.columns, max(1, _ROWS // max(1, layer.shape.columns))
    group = group_of_columns(layer.layout()).to(zero.device)
    packed = []
    for start in range(0, layer.shape.rows, rows):
        part = slice(start, min(start + rows, layer.shape.rows))
        codes = form.integer_weights(layer, part) + zero[part][:, group].to(torch.int16)
        packed.append(pack(codes, form.kernel_bits(layer)))
    return torch.cat(packed) if packed else zero.new_zeros(0, packed_length(columns, 1))
