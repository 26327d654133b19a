"""Weights that are learned through their codes, with straight-through gradients.

    ŵ = s·(clamp(round(u) + round(z), least, most) − round(z))

Either the place u of a weight on the grid of codes is learned, apart from its scale s: a step of s
then moves all weights of a group and changes no code. Or the weight w is, with ``u = w/s``, and s
follows rounding errors alone (EfficientQAT, LSQ). A clipped weight passes nothing to u, and all to
z, which clipped it.
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
        by_value: whether weights are given as w, and not as u.
    """

    groups: list[tuple[int, int]]
    least: Tensor
    most: Tensor
    owner: Tensor
    by_value: bool

    @classmethod
    def of(
        cls,
        groups: list[tuple[int, int]],
        bounds: list[tuple[int, int]],
        *,
        by_value: bool,
        device: torch.device | None = None,
    ) -> CodeGrid:
        """With the least and the largest code of every group."""
        sizes = torch.tensor([stop - start for start, stop in groups], device=device)
        owner = torch.arange(len(groups), device=device).repeat_interleave(sizes)
        each = torch.tensor(bounds, dtype=torch.float32, device=device)[owner]
        return cls(groups, each[:, 0].contiguous(), each[:, 1].contiguous(), owner, by_value)

    def spread(self, of_groups: Tensor) -> Tensor:
        """What every group has, ``(out, groups)``, for its columns, ``(out, in)``."""
        return of_groups.index_select(1, self.owner)

    def gathered(self, of_columns: Tensor) -> Tensor:
        """Sums over the columns of each group: ``(out, in)`` → ``(out, groups)``."""
        return torch.stack([of_columns[:, a:b].sum(1) for a, b in self.groups], 1)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes, whole numbers, float32 ``(out, in)``; columns in the order of the groups.

        Args:
            weight: w or u, ``(out, in)``.
            scale, zero: ``(out, groups)``; zero-points are whole.
        """
        codes = half_up(self.place(weight, scale)).add_(self.spread(zero))
        return codes.clamp_(min=self.least, max=self.most)

    def place(self, weight: Tensor, scale: Tensor) -> Tensor:
        """u of every weight, ``(out, in)``."""
        return weight / self.spread(scale) if self.by_value else weight


def learned_weight(weight: Tensor, scale: Tensor, zero: Tensor, grid: CodeGrid) -> Tensor:
    """Values of codes, float32 ``(out, in)``, differentiable in weight, scale and zero.

    Arguments as for :meth:`CodeGrid.codes`; scales are positive.
    """
    return cast(Tensor, _LearnedWeight.apply(weight, scale, zero, grid))  # type: ignore[no-untyped-call]


class _LearnedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, grid: CodeGrid) -> Tensor:
        levels = grid.codes(weight, scale, zero).sub_(grid.spread(zero))
        ctx.grid = grid
        ctx.save_for_backward(weight, scale, levels)
        return levels * grid.spread(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grid: CodeGrid = ctx.grid
        weight, scale, levels = ctx.saved_tensors
        place = grid.place(weight, scale)
        through = (levels - place).abs_().le_(_TIE) * gradient
        by_zero = None
        if ctx.needs_input_grad[2]:
            by_zero = -scale * grid.gathered(gradient - through)
        if grid.by_value:
            by_scale = grid.gathered((levels * gradient).sub_(through * place))
            return through, by_scale, by_zero, None
        by_scale = grid.gathered(levels * gradient)
        return through.mul_(grid.spread(scale)), by_scale, by_zero, None


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
