"""The weights of one fitted layer as what learns them has them, and back."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.learned_codes import CodeGrid, bounded, learned_weight, whole

CODINGS = ("affine", "ternary")
"""Kinds of weight codes that have gradients."""

_FLOOR = 0.01  # of a scale's start: it stays positive, however small the group's weights are
_MARGIN = 0.1  # by which weights start within the interval that rounds to their code


class LearnedLayer(NamedTuple):
    """What is learned of a layer, float32.

    Attributes:
        weight: ``(out, in)``, columns in stored order.
        scale, zero: ``(out, groups)``; no zero-point is learned where it is fixed.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None

    def clone(self) -> LearnedLayer:
        """A copy that later steps do not touch."""
        zero = None if self.zero is None else self.zero.detach().clone()
        return LearnedLayer(self.weight.detach().clone(), self.scale.detach().clone(), zero)


class LearnableLayer:
    """A fitted layer whose weights, scales and zero-points are learned; steps of columns and the
    groups of its inputs stay.

    Args:
        layer: as it was fitted; its codes are kept where nothing is learned.
        weight: ``(out, in)``: where weights start as far as they keep those codes.
        by_value: whether weights and scales are learned as they are; otherwise places on the grid
            of codes, and scales as shares of their start.
    """

    def __init__(self, layer: SpikingLinear, weight: Tensor, *, by_value: bool) -> None:
        self._layer, settings = layer, layer.settings.weights
        layout, self._ternary = layer.layout(), layer.format.coding == "ternary"
        self._order, tops = layout.order, [settings.top(steps) for steps in layout.weight_steps]
        scale = layer.weight_scale[:, : len(tops)].float().clone()
        device = scale.device
        self._grid = CodeGrid.of(
            layout.weight_groups,
            [(self._least_code(top, symmetric=settings.symmetric), top) for top in tops],
            by_value=by_value,
            device=device,
        )
        self._unit = torch.ones_like(scale) if by_value else scale
        self._floor, self._endless = _FLOOR * scale, torch.full_like(scale, torch.inf)
        self._top = torch.tensor(tops, dtype=torch.float32, device=device)
        self._zero = torch.zeros_like(scale)
        if not self._ternary:
            self._zero = layer.packed_codes().zero[:, : len(tops)].float()
        levels, reach = layer.integer_weights().float(), 0.5 - _MARGIN
        stored = weight if layout.order is None else weight.index_select(1, layout.order)
        place = stored.float() / self._grid.spread(scale)
        kept = torch.minimum(torch.maximum(place, levels - reach), levels + reach)
        self.start = LearnedLayer(
            kept * self._grid.spread(scale) if by_value else kept,
            scale / self._unit,
            None if self._ternary or settings.symmetric else self._zero.clone(),
        )

    def _least_code(self, top: int, *, symmetric: bool) -> int:
        if self._ternary:
            return -top
        return top % 2 if symmetric else 0

    def value(self, learned: LearnedLayer) -> Tensor:
        """The weight that the codes stand for, ``(out, in)``, columns in their own order."""
        value = learned_weight(learned.weight, *self._parts(learned), self._grid)
        if self._order is None:
            return value
        return torch.empty_like(value).index_copy(1, self._order, value)

    def layer(self, learned: LearnedLayer) -> SpikingLinear:
        """The layer with what was learned."""
        scale, zero = self._parts(learned)
        codes = self._grid.codes(learned.weight, scale, zero)
        layer = copy.deepcopy(self._layer)
        layer.set_weights(
            AffineWeights(
                codes.to(torch.int8 if self._ternary else torch.uint8), scale, zero.to(torch.uint8)
            )
        )
        return layer

    def _parts(self, learned: LearnedLayer) -> tuple[Tensor, Tensor]:
        """Scales and whole zero-points."""
        scale = bounded(learned.scale * self._unit, self._floor, self._endless)
        zero = self._zero if learned.zero is None else whole(learned.zero, self._top)
        return scale, zero
