"""Binary-coded weights, ``w ≈ Σ_p α_p·b_p`` with ``b_p ∈ {−1, +1}``: a layer made of additions
alone.

    y[n, o] = Σ_segments Σ_p α_p[o, segment] · ( Σ_{c: b=+1} x[n, c] − Σ_{c: b=−1} x[n, c] ) +
    bias[o]

A plane is one bit a weight, and has no zero: every input is added or subtracted. To kernels a layer
is the sum of its planes, each a ternary layer of one step, whose columns without such a plane are
zeros. With coded inputs the sums of a plane are integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.kernels.prepared import PackedCodes
from spikellm.nn.formats.affine import SCALE_TYPES
from spikellm.nn.formats.base import Buffer, LayerShape, Stored, WeightFormat, register
from spikellm.nn.formats.plane import Plane, scaled_sum
from spikellm.nn.formats.plane_options import PlaneOptions
from spikellm.nn.formats.ternary import plane_sizes, stored_sizes
from spikellm.nn.formats.ternary_digits import scale_groups
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.bcq import MOST_PLANES
from spikellm.quantization.packing import pack, packed_length, unpack
from spikellm.quantization.powers import terms_of


class PlaneWeights(NamedTuple):
    """Binary-coded weights.

    Attributes:
        patterns: uint8, ``(out, in)``: bit p is set where plane p adds.
        scale: float32, ``(out, groups, planes)``; 1 where a group has no such plane.
    """

    patterns: Tensor
    scale: Tensor


@register
class BcqFormat(WeightFormat):
    """Buffers: ``weight_planes`` (uint8, ``(out, bytes)``: the planes one after the other, each
    with one bit for every column that has it, in stored order), ``weight_scale`` (bfloat16 or
    float32, ``(out, groups · planes)``: the scales of a group side by side) and, where a budget is
    spent, ``column_steps`` (uint8, ``(in,)``: planes of every column).

    Sizes are the columns that have at least 1, 2, … planes, where a budget is spent.
    """

    name = "bcq"
    coding = "bcq"
    integer_form = "planes"
    unrolls = True

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        sizes, mixed = self.plane_sizes(shape), shape.settings.weights.budget is not None
        groups = (
            scale_groups(shape, sizes)
            if mixed
            else most_weight_groups(shape.columns, shape.settings)
        )
        length = sum(packed_length(columns, 1) for columns in sizes)
        found = [
            Buffer("weight_planes", (shape.rows, length), torch.uint8, 0),
            self.scale_buffer(shape, groups),
        ]
        if mixed:
            found.append(Buffer("column_steps", (shape.columns,), torch.uint8, 1))
        return found

    def scale_buffer(self, shape: LayerShape, groups: int) -> Buffer:
        """Scales of so many groups; unused ones stay 1."""
        width = groups * len(self.plane_sizes(shape))
        kind = SCALE_TYPES[shape.settings.weights.scale_bits]
        return Buffer("weight_scale", (shape.rows, width), kind, 1)

    def plane_sizes(self, shape: LayerShape) -> tuple[int, ...]:
        """Columns that have at least 1, 2, … planes."""
        weights = cast(PlaneOptions, shape.settings.weights)
        if weights.budget is None:
            return (shape.columns,) * weights.most_planes
        return shape.sizes or (shape.columns,)

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return stored_sizes(state)

    def fitted_sizes(self, weights: PlaneWeights, column_steps: Tensor | None) -> tuple[int, ...]:
        return () if column_steps is None else plane_sizes(column_steps)

    def column_steps(self, layer: Stored) -> Tensor | None:
        mixed = layer.shape.settings.weights.budget is not None
        return layer.get_buffer("column_steps") if mixed else None

    def write(self, layer: Stored, weights: PlaneWeights) -> None:
        present = self.present(layer)
        planes = [
            pack(((weights.patterns >> p) & 1)[:, columns], 1) for p, columns in enumerate(present)
        ]
        layer.get_buffer("weight_planes").copy_(torch.cat(planes, 1))
        scale = weights.scale.flatten(1)
        layer.weight_scale[:, : scale.shape[1]] = scale

    def present(self, layer: Stored) -> list[Tensor]:
        """Stored columns that have each plane, int64."""
        whole, sizes = torch.arange(layer.shape.columns), self.plane_sizes(layer.shape)
        steps = self.column_steps(layer)
        if steps is None:
            return [whole.to(layer.weight_scale.device)] * len(sizes)
        stored = layer.stored(steps)
        return [(stored > p).nonzero().flatten() for p in range(len(sizes))]

    def signs(self, layer: Stored, plane: int, rows: slice = slice(None)) -> Tensor:
        """A plane, int8 ``(out, in)`` in stored order: −1 or 1, and 0 in columns that lack it."""
        sizes, present = self.plane_sizes(layer.shape), self.present(layer)[plane]
        lengths = [packed_length(columns, 1) for columns in sizes]
        packed = layer.get_buffer("weight_planes")[rows].split(lengths, 1)[plane]
        bits = unpack(packed, 1, sizes[plane]).view(torch.int8).bitwise_left_shift(1).sub_(1)
        if sizes[plane] == layer.shape.columns:
            return bits
        whole = bits.new_zeros(len(bits), layer.shape.columns)
        return whole.index_copy_(1, present, bits)

    def scales(self, layer: Stored) -> Tensor:
        """Scales, ``(out, groups, planes)``."""
        planes = len(self.plane_sizes(layer.shape))
        return layer.weight_scale.view(layer.shape.rows, -1, planes)

    def as_planes(self, layer: Stored) -> list[Plane]:
        scale = self.scales(layer)
        return [
            Plane(self, layer, number, scale[:, :, number].contiguous())
            for number in range(scale.shape[2])
        ]

    def integer_weights(self, layer: Stored, rows: slice) -> Tensor:
        raise RequestError(
            f"{self.name} weights have no single integer form: each plane has scales of its own"
        )

    def dense_weight(self, layer: Stored) -> Tensor:
        return scaled_sum(self.as_planes(layer), layer.layout())

    def kernel_bits(self, layer: Stored) -> int:
        return 2

    def packed_codes(self, layer: Stored) -> PackedCodes:
        raise RequestError(f"{self.name} weights have codes for each plane alone")

    def additive_share(self, layer: Stored) -> float:
        return 1.0

    def planes_by_group(self, layer: Stored) -> tuple[int, ...]:
        layout = layer.layout()
        if self.column_steps(layer) is None:
            return (len(self.plane_sizes(layer.shape)),) * len(layout.weight_groups)
        return tuple(layout.weight_steps)

    def validation_error(self, layer: Stored) -> str | None:
        steps = self.column_steps(layer)
        if steps is not None:
            least, most = int(steps.min()), int(steps.max())
            if least < 1 or most > MOST_PLANES:
                return f"column_steps holds {least} to {most}, expected 1 to {MOST_PLANES}"
        return self.scale_error(layer)

    def scale_error(self, layer: Stored) -> str | None:
        """Scales that are no sums of as few powers of two as the recipe says."""
        terms = cast(PlaneOptions, layer.shape.settings.weights).scale_terms
        if terms is not None and int(terms_of(layer.weight_scale).max()) > terms:
            return f"weight_scale holds values of more than {terms} powers of two"
        return None
