"""Weights that are ternary spikes, ``w ≈ α·Σ_t s(t)`` with ``s(t) ∈ {−1, 0, +1}``: a layer made of
additions alone.

    y[n, o] = Σ_segments α[o, segment] · Σ_t ( Σ_{c: s=+1} x[n, c] − Σ_{c: s=−1} x[n, c] )  +
    bias[o]

Every step adds an input, skips it or subtracts it; one scaling a row and segment ends the sum. A
step is a plane of +1 and a plane of −1, one bit a weight each. Columns take different numbers of
steps; columns of equal steps share α in each row. With coded inputs the sums are integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spikellm.kernels.prepared import PackedCodes
from spikellm.nn.formats.affine import SCALE_TYPES, repacked
from spikellm.nn.formats.base import Buffer, LayerShape, Stored, WeightFormat, register
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.packing import pack, packed_length, unpack


@register
class TernaryFormat(WeightFormat):
    """Buffers: ``spikes_plus`` and ``spikes_minus`` (uint8, ``(out, bytes)``: the planes one after
    the other, each with one bit for every column that takes so many steps, in stored order),
    ``column_steps`` (uint8, ``(in,)``) and ``weight_scale`` (float32, or bfloat16 with scales of
    16 bits, ``(out, groups)``).

    Sizes are the columns that take at least 1, 2, … steps.
    """

    name = "ternary"
    coding = "ternary"
    integer_form = "ternary"
    unrolls = True

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        sizes, rows = _sizes(shape), shape.rows
        length = sum(packed_length(columns, 1) for columns in sizes)
        groups = most_weight_groups(shape.columns, shape.settings, max(2, len(sizes)))
        scales = SCALE_TYPES[shape.settings.weights.scale_bits]
        return [
            Buffer("spikes_plus", (rows, length), torch.uint8, 0),
            Buffer("spikes_minus", (rows, length), torch.uint8, 0),
            Buffer("column_steps", (shape.columns,), torch.uint8, 1),
            Buffer("weight_scale", (rows, groups), scales, 1),
        ]

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        steps = state["column_steps"]
        if steps.dtype != torch.uint8:
            raise ValueError(f"column_steps holds {steps.dtype}, expected {torch.uint8}")
        return plane_sizes(steps)

    def fitted_sizes(self, weights: AffineWeights, column_steps: Tensor | None) -> tuple[int, ...]:
        return () if column_steps is None else plane_sizes(column_steps)

    def column_steps(self, layer: Stored) -> Tensor:
        return layer.get_buffer("column_steps")

    def write(self, layer: Stored, weights: AffineWeights) -> None:
        """Take over codes ``−T … T``; zero-points are not used."""
        steps = layer.stored(self.column_steps(layer))
        for name, sign in (("spikes_plus", 1), ("spikes_minus", -1)):
            planes = [
                pack((sign * weights.codes[:, steps > t] > t).to(torch.uint8), 1)
                for t in range(int(steps.max()))
            ]
            layer.get_buffer(name).copy_(torch.cat(planes, 1))
        layer.weight_scale[:, : weights.scale.shape[1]] = weights.scale

    def integer_weights(self, layer: Stored, rows: slice) -> Tensor:
        steps = layer.stored(self.column_steps(layer))
        planes = self.planes(layer, rows)
        total = torch.zeros(
            len(planes[0][0]), layer.shape.columns, dtype=torch.int16, device=steps.device
        )
        for t, (plus, minus) in enumerate(planes):
            spikes = (plus.view(torch.int8) - minus.view(torch.int8)).to(torch.int16)
            total.index_add_(1, (steps > t).nonzero().flatten(), spikes)
        return total

    def planes(self, layer: Stored, rows: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
        """``(plus, minus)`` of every step, uint8 {0, 1}, ``(out, columns of that step)``."""
        sizes = _sizes(layer.shape)
        lengths = [packed_length(columns, 1) for columns in sizes]
        plus, minus = (
            layer.get_buffer(name)[rows].split(lengths, 1)
            for name in ("spikes_plus", "spikes_minus")
        )
        return [
            (unpack(one, 1, columns), unpack(other, 1, columns))
            for one, other, columns in zip(plus, minus, sizes, strict=True)
        ]

    def kernel_bits(self, layer: Stored) -> int:
        return max(2, (2 * max(layer.layout().weight_steps)).bit_length())

    def packed_codes(self, layer: Stored) -> PackedCodes:
        most = max(layer.layout().weight_steps)
        zero = torch.full_like(layer.weight_scale, most, dtype=torch.uint8)
        codes = repacked(self, layer, zero)
        self.release(layer)
        return PackedCodes(codes, zero)

    def additive_share(self, layer: Stored) -> float:
        return 1.0

    def validation_error(self, layer: Stored) -> str | None:
        steps, sizes = self.column_steps(layer), layer.shape.sizes
        if plane_sizes(steps) != sizes or int(steps.min()) < 1:
            return (
                f"column_steps fits {plane_sizes(steps)} columns by step, config.json says {sizes}"
            )
        overlap = any(bool((plus & minus).any()) for plus, minus in self.planes(layer))
        self.release(layer)
        return "spikes_plus and spikes_minus fire at once" if overlap else None


def plane_sizes(column_steps: Tensor) -> tuple[int, ...]:
    """Columns that take at least 1, 2, … steps."""
    return tuple(int((column_steps > t).sum()) for t in range(int(column_steps.max())))


def _sizes(shape: LayerShape) -> tuple[int, ...]:
    return shape.sizes or (shape.columns,)
