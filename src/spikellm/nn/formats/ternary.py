"""Weights that are ternary spikes, ``w ≈ α·Σ_t s(t)`` with ``s(t) ∈ {−1, 0, +1}``: a layer made of
additions alone.

    y[n, o] = Σ_segments α[o, segment] · Σ_t ( Σ_{c: s=+1} x[n, c] − Σ_{c: s=−1} x[n, c] )  +
    bias[o]

Every step adds an input, skips it or subtracts it; one scaling a row and segment ends the sum. A
step is a plane of +1 and a plane of −1. Columns take different numbers of steps; columns of equal
steps share α in each row. With coded inputs the sums are integers.

What is stored are the planes, one bit a weight each, or the integers ``Σ_t s(t)`` as digits
(:mod:`spikellm.nn.formats.ternary_digits`), which takes less; the layer is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spikellm.kernels.prepared import PackedCodes
from spikellm.nn.formats.affine import SCALE_TYPES, repacked
from spikellm.nn.formats.base import Buffer, LayerShape, Stored, WeightFormat, register
from spikellm.nn.formats.ternary_digits import (
    as_digits,
    codes_error,
    pack_codes,
    row_bytes,
    scale_groups,
    stores_steps,
    unpack_codes,
)
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.packing import pack, packed_length, unpack
from spikellm.recipe.base import WeightOptions


@register
class TernaryFormat(WeightFormat):
    """Buffers: ``spikes_plus`` and ``spikes_minus`` (uint8, ``(out, bytes)``: the planes one after
    the other, each with one bit for every column that takes so many steps, in stored order), or
    ``spike_digits`` (uint8, ``(out, bytes)``) in their place; ``column_steps`` (uint8, ``(in,)``),
    unless codes are digits and the recipe gives all columns one step; and ``weight_scale``
    (float32, or bfloat16 with scales of 16 bits, ``(out, groups)``).

    Sizes are the columns that take at least 1, 2, … steps.
    """

    name = "ternary"
    coding = "ternary"
    integer_form = "ternary"
    unrolls = True

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        sizes, rows, byte = _sizes(shape), shape.rows, torch.uint8
        if as_digits(shape.settings.weights):
            codes = [Buffer("spike_digits", (rows, row_bytes(sizes)), byte, 0)]
            groups = scale_groups(shape, sizes)
        else:
            length = sum(packed_length(columns, 1) for columns in sizes)
            codes = [
                Buffer(name, (rows, length), byte, 0) for name in ("spikes_plus", "spikes_minus")
            ]
            groups = most_weight_groups(shape.columns, shape.settings, max(2, len(sizes)))
        if stores_steps(shape.settings.weights):
            codes.append(Buffer("column_steps", (shape.columns,), byte, 1))
        scales = SCALE_TYPES[shape.settings.weights.scale_bits]
        return [*codes, Buffer("weight_scale", (rows, groups), scales, 1)]

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return stored_sizes(state)

    def keeps_steps(self, weights: WeightOptions) -> bool:
        return stores_steps(weights)

    def fitted_sizes(self, weights: AffineWeights, column_steps: Tensor | None) -> tuple[int, ...]:
        return () if column_steps is None else plane_sizes(column_steps)

    def column_steps(self, layer: Stored) -> Tensor:
        if stores_steps(layer.shape.settings.weights):
            return layer.get_buffer("column_steps")
        device = layer.weight_scale.device
        return torch.ones(layer.shape.columns, dtype=torch.uint8, device=device)

    def write(self, layer: Stored, weights: AffineWeights) -> None:
        """Take over codes ``−T … T``; zero-points are not used."""
        steps = layer.stored(self.column_steps(layer))
        if as_digits(layer.shape.settings.weights):
            layer.get_buffer("spike_digits").copy_(pack_codes(weights.codes, steps))
        else:
            for name, sign in (("spikes_plus", 1), ("spikes_minus", -1)):
                planes = [
                    pack((sign * weights.codes[:, steps > t] > t).to(torch.uint8), 1)
                    for t in range(int(steps.max()))
                ]
                layer.get_buffer(name).copy_(torch.cat(planes, 1))
        layer.weight_scale[:, : weights.scale.shape[1]] = weights.scale

    def integer_weights(self, layer: Stored, rows: slice) -> Tensor:
        steps = layer.stored(self.column_steps(layer))
        if as_digits(layer.shape.settings.weights):
            packed = layer.get_buffer("spike_digits")[rows]
            return unpack_codes(packed, steps, _sizes(layer.shape))
        planes = self._stored_planes(layer, rows)
        total = torch.zeros(
            len(planes[0][0]), layer.shape.columns, dtype=torch.int16, device=steps.device
        )
        for t, (plus, minus) in enumerate(planes):
            spikes = (plus.view(torch.int8) - minus.view(torch.int8)).to(torch.int16)
            total.index_add_(1, (steps > t).nonzero().flatten(), spikes)
        return total

    def planes(self, layer: Stored, rows: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
        """``(plus, minus)`` of every step, uint8 {0, 1}, ``(out, columns of that step)``."""
        if not as_digits(layer.shape.settings.weights):
            return self._stored_planes(layer, rows)
        codes, steps = self.integer_weights(layer, rows), layer.stored(self.column_steps(layer))
        chosen = [codes[:, steps > t] for t in range(len(_sizes(layer.shape)))]
        return [
            ((own > t).to(torch.uint8), (-own > t).to(torch.uint8)) for t, own in enumerate(chosen)
        ]

    def _stored_planes(self, layer: Stored, rows: slice) -> list[tuple[Tensor, Tensor]]:
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
        steps, sizes = self.column_steps(layer), _sizes(layer.shape)
        if plane_sizes(steps) != sizes or int(steps.min()) < 1:
            return (
                f"column_steps fits {plane_sizes(steps)} columns by step, config.json says {sizes}"
            )
        if as_digits(layer.shape.settings.weights):
            problem = codes_error(layer.get_buffer("spike_digits"), sizes)
        else:
            overlap = any(bool((plus & minus).any()) for plus, minus in self.planes(layer))
            problem = "spikes_plus and spikes_minus fire at once" if overlap else None
        self.release(layer)
        return problem


def stored_sizes(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """:func:`plane_sizes` of a layer with these buffers; none where it stores no steps.

    Raises:
        ValueError: the steps are no bytes.
    """
    steps = state.get("column_steps")
    if steps is None:
        return ()
    if steps.dtype != torch.uint8:
        raise ValueError(f"column_steps holds {steps.dtype}, expected {torch.uint8}")
    return plane_sizes(steps)


def plane_sizes(column_steps: Tensor) -> tuple[int, ...]:
    """Columns that take at least 1, 2, … steps."""
    return tuple(int((column_steps > t).sum()) for t in range(int(column_steps.max())))


def _sizes(shape: LayerShape) -> tuple[int, ...]:
    known = shape.sizes and stores_steps(shape.settings.weights)
    return shape.sizes if known else (shape.columns,)
