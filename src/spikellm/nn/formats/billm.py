"""Weights as BiLLM has them (Huang et al., ICML 2024), without the means: additions alone.

Weights of salient columns are ``±α_1 ± α_2``, two planes of which the second codes what the first
leaves. All others are ``±α_small`` or ``±α_large``: a sign, and one bit for the group of
magnitudes, which BiLLM does not count. So every weight takes two bits and its share of the scales.
Each plane of the others is zero where the other one is not, so that a spike adds once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spikellm.nn.formats.base import Buffer, LayerShape, Stored, register
from spikellm.nn.formats.bcq import BcqFormat, PlaneWeights
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.packing import packed_length, unpack

REST, SALIENT = 1, 2  # additions of a spike for each weight


@register
class BillmFormat(BcqFormat):
    """Buffers as of ``bcq``; the first plane holds signs, the second groups of magnitudes, and
    second signs in salient columns. ``column_steps`` (uint8, ``(in,)``) is 2 where a column is
    salient, else 1.
    """

    name = "billm"
    coding = "billm"

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        groups = most_weight_groups(shape.columns, shape.settings, SALIENT)
        length = sum(packed_length(columns, 1) for columns in self.plane_sizes(shape))
        return [
            Buffer("weight_planes", (shape.rows, length), torch.uint8, 0),
            self.scale_buffer(shape, groups),
            Buffer("column_steps", (shape.columns,), torch.uint8, REST),
        ]

    def plane_sizes(self, shape: LayerShape) -> tuple[int, ...]:
        return (shape.columns, shape.columns)

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return ()

    def fitted_sizes(self, weights: PlaneWeights, column_steps: Tensor | None) -> tuple[int, ...]:
        return ()

    def column_steps(self, layer: Stored) -> Tensor:
        return layer.get_buffer("column_steps")

    def planes_by_group(self, layer: Stored) -> tuple[int, ...]:
        return (2,) * len(layer.layout().weight_groups)

    def present(self, layer: Stored) -> list[Tensor]:
        return [torch.arange(layer.shape.columns, device=layer.weight_scale.device)] * 2

    def signs(self, layer: Stored, plane: int, rows: slice = slice(None)) -> Tensor:
        """A plane, int8 ``(out, in)`` in stored order: −1, 0 or 1."""
        columns = layer.shape.columns
        first, second = (
            unpack(packed, 1, columns).view(torch.int8)
            for packed in layer.get_buffer("weight_planes")[rows].chunk(2, 1)
        )
        salient = layer.stored(self.column_steps(layer)) == SALIENT
        signs = (first << 1) - 1
        if plane == 0:
            return torch.where(salient, signs, signs * (1 - second))
        return torch.where(salient, 2 * second - 1, signs * second)

    def validation_error(self, layer: Stored) -> str | None:
        steps = self.column_steps(layer)
        if not bool(((steps == REST) | (steps == SALIENT)).all()):
            return f"column_steps holds values other than {REST} and {SALIENT}"
        return self.scale_error(layer)
