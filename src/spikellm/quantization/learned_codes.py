"""Weights that are learned through their codes, with gradients of w, s and z (EfficientQAT's
Block-AP, LSQ):

    ŵ = s·(clamp(round(w/s) + round(z), least, most) − round(z))

Rounding passes gradients straight through. A weight inside the range passes its gradient to w, and
its rounding error to s; a clipped one passes nothing to w, and all to s and z, which clipped it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spikellm.quantization.rounding import half_up
from spikellm.quantization.ste import pass_through

_TIE = 0.5 + 1e-3  # a rounding error that is not larger is one of rounding, not of clipping


@dataclass(frozen=True)
class CodeGrid:
    """Codes that a weight matrix may take.

    Attributes:
        groups: ``(start, stop)`` of the columns that share a scale in each row.
        least, most: float32, ``(in,)``: of every column.
        owner: group of every column, int64 ``(in,)``.
    """

    groups: list[tuple[int, int]]
    least: Tensor
    most: Tensor
    owner: Tensor

    @classmethod
    def of(cls, groups: list[tuple[int, int]], least: list[int], most: list[int]) -> CodeGrid:
        """With bounds of every group."""
        owner = torch.arange(len(groups)).repeat_interleave(
            torch.tensor([stop - start for start, stop in groups])
        )
        low, high = (torch.tensor(bound, dtype=torch.float32)[owner] for bound in (least, most))
        return cls(groups, low, high, owner)

    def to(self, device: torch.device) -> CodeGrid:
        """The same on another device."""
        tensors = (one.to(device) for one in (self.least, self.most, self.owner))
        return CodeGrid(self.groups, *tensors)

    def spread(self, of_groups: Tensor) -> Tensor:
        """What every group has, ``(out, groups)``, for its columns, ``(out, in)``."""
        return of_groups.index_select(1, self.owner)

    def gathered(self, of_columns: Tensor) -> Tensor:
        """Sums over the columns of each group: ``(out, in)`` → ``(out, groups)``."""
        return torch.stack([of_columns[:, a:b].sum(1) for a, b in self.groups], 1)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes, whole numbers, float32 ``(out, in)``; columns in the order of the groups.

        Args:
            weight: ``(out, in)``.
            scale, zero: ``(out, groups)``; zero-points are whole.
        """
        codes = half_up(weight / self.spread(scale)).add_(self.spread(zero))
        return codes.clamp_(min=self.least, max=self.most)


def learned_weight(
    weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor, grid: CodeGrid
) -> Tensor:
    """Values of the codes of ``unit·weight`` with scales ``unit·scale``, float32 ``(out, in)``.

    Differentiable in weight, scale and zero.

    Args:
        weight: ``(out, in)``.
        scale, zero: ``(out, groups)``; scales are positive, zero-points whole.
        unit: what weights and scales are given in, ``(out, groups)``; a constant.
    """
    return cast(Tensor, _LearnedWeight.apply(weight, scale, zero, unit, grid))  # type: ignore[no-untyped-call]


class _LearnedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, unit: Tensor, grid: CodeGrid
    ) -> Tensor:
        levels = grid.codes(weight, scale, zero).sub_(grid.spread(zero))
        ctx.grid = grid
        ctx.save_for_backward(weight, scale, unit, levels)
        return levels * grid.spread(scale * unit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grid: CodeGrid = ctx.grid
        weight, scale, unit, levels = ctx.saved_tensors
        gradient = gradient * grid.spread(unit)
        position = weight / grid.spread(scale)
        inside = (levels - position).abs_().le_(_TIE)
        through = inside * gradient
        by_scale = grid.gathered((levels * gradient).sub_(position.mul_(through)))
        by_zero = None
        if ctx.needs_input_grad[2]:
            by_zero = -scale * grid.gathered(gradient.sub_(through))
        return through, by_scale, by_zero, None, None


def bounded(values: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Values kept within bounds; gradients pass as if they were not, so that none is stuck."""
    with torch.no_grad():
        kept = torch.minimum(torch.maximum(values, least), most)
    return pass_through(values, kept)


def whole(values: Tensor, most: Tensor) -> Tensor:
    """Whole numbers from 0 to ``most``; gradients pass straight through."""
    with torch.no_grad():
        rounded = torch.minimum(half_up(values).clamp_(min=0), most)
    return pass_through(values, rounded)
