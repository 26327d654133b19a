"""GPTQ of binary-coded weights (ShiftAddLLM; You et al., NeurIPS 2024): planes of ±1 whose scales
are fitted in turn with them, inside error feedback.

What the published code does in its accurate mode, one scale for each column and 128 rows, and
rotations that its layers do not run, is left out; scales belong to a row and a group of columns.
"""

from __future__ import annotations

from math import isfinite
from typing import cast

import torch
from torch import Tensor

from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.algorithms.step_budget import spend_in_layer
from spikellm.core.errors import NumericalError
from spikellm.nn.formats.bcq import PlaneWeights
from spikellm.nn.formats.plane_options import PlaneOptions
from spikellm.quantization.bcq import (
    PlaneTable,
    Rounding,
    fit_scales,
    plane_errors,
    refit_scales,
    signs_of,
)
from spikellm.quantization.column_update import permuted
from spikellm.quantization.coordinate_descent import descend, pull_of
from spikellm.recipe.base import WeightOptions

_ENOUGH = 1e-3  # relative gain below which fitting stops
_SWEEPS = 2  # over the groups of a layer


@column_coders.register("bcq")
class BcqCoder(ColumnCoder):
    """Planes and scales fitted in turn until the layer's error stops falling."""

    options = ("rounds", "descents")
    has_zero = False

    def column_steps(
        self, chosen: Tensor | None, weight: Tensor, importance: Tensor, settings: WeightOptions
    ) -> Tensor | None:
        if chosen is not None or settings.budget is None:
            return chosen
        return spend_in_layer(weight, importance, settings, self.step_errors)

    def step_errors(
        self, weight: Tensor, importance: Tensor, settings: WeightOptions, rows: Tensor | None
    ) -> Tensor:
        most = cast(PlaneOptions, settings).most_planes
        return plane_errors(weight, importance, most, rows)

    def code(self, problem: GPTQProblem) -> PlaneWeights:
        """From scales fitted to the weights on; the best pair goes on to coordinate descent."""
        problem = problem._replace(hessian=problem.hessian.float())
        settings = cast(PlaneOptions, problem.settings.weights)
        rounding = Rounding(settings.scale_bits, settings.scale_terms)
        importance = problem.importance
        planes = problem.steps if settings.budget else [settings.most_planes] * len(problem.groups)
        scales = [
            fit_scales(problem.weight[:, a:b], importance[a:b], count, rounding)
            for (a, b), count in zip(problem.groups, planes, strict=True)
        ]
        best, best_error = PlaneCodes(problem, scales), float("inf")
        for _ in range(problem.options.rounds):
            coded = PlaneCodes(problem, scales)
            problem.propagate_error(coded.error)
            scales = coded.refit(rounding)
            error = problem.error(coded.values.T)
            gained = best_error - error
            if gained > 0:
                best, best_error = coded, error
            if gained <= _ENOUGH * error:
                break
        if not isfinite(best_error):
            raise NumericalError(
                "the error of a layer in planes is not finite; its inputs or weights are too"
                " large for float32"
            )
        best.descend(rounding)
        return best.weights()


class PlaneCodes:
    """Planes of the columns of a problem, and their scales.

    Args:
        scales: of each group, ``(out, planes)``.

    Attributes:
        values: what codes stand for, float32 ``(in, out)``: a column at a time is contiguous.
    """

    def __init__(self, problem: GPTQProblem, scales: list[Tensor]) -> None:
        self._problem = problem
        self.values = torch.zeros_like(problem.weight.T, memory_format=torch.contiguous_format)
        self._rescale(scales)

    def _rescale(self, scales: list[Tensor]) -> None:
        self.scales, self._tables = scales, [PlaneTable(scale) for scale in scales]

    def _code(self, column: int, w: Tensor) -> Tensor:
        table = self._tables[self._problem.owner[column]]
        return self.values[column].copy_(table.nearest(w))

    def error(self, column: int, w: Tensor, error: Tensor) -> None:
        """Code a column and write what it misses, as error feedback wants it."""
        torch.sub(w, self._code(column, w), out=error)

    def value(self, column: int, w: Tensor, value: Tensor) -> None:
        """Code a column and write what it holds, as coordinate descent wants it."""
        value.copy_(self._code(column, w))

    def _patterns(self) -> list[Tensor]:
        """Of each group, uint8 ``(out, columns)``."""
        return [
            table.patterns(self.values[start:stop].T)
            for table, (start, stop) in zip(self._tables, self._problem.groups, strict=True)
        ]

    def refit(self, rounding: Rounding) -> list[Tensor]:
        """Take scales fitted by least squares, and give them."""
        problem, scales = self._problem, list(self.scales)
        signs = [
            signs_of(patterns, scale.shape[1])
            for patterns, scale in zip(self._patterns(), scales, strict=True)
        ]
        residual = problem.weight - self.values.T
        for _ in range(_SWEEPS):
            for group, (start, stop) in enumerate(problem.groups):
                scales[group] = refit_scales(
                    residual,
                    signs[group],
                    problem.hessian,
                    slice(start, stop),
                    scales[group],
                    rounding,
                )
        for group, (start, stop) in enumerate(problem.groups):
            own = torch.einsum("poc,op->oc", signs[group], scales[group])
            self.values[start:stop] = own.T
        self._rescale(scales)
        return scales

    def descend(self, rounding: Rounding) -> None:
        """Coordinate descent on planes and least squares of scales, in turn, where asked for."""
        problem, options = self._problem, self._problem.options
        if not options.descents:
            return
        order, places = problem.order, problem.order.tolist()
        pull = pull_of(permuted(problem.hessian, order), options.percdamp)
        for _ in range(options.descents):
            _, changed = descend(
                problem.weight[:, order],
                self.values.T[:, order],
                pull,
                lambda column, w, value: self.value(places[column], w, value),
            )
            if not changed:
                break
            self.refit(rounding)

    def weights(self) -> PlaneWeights:
        """As formats take them over."""
        most = max(scale.shape[1] for scale in self.scales)
        scale = torch.ones(len(self.scales), self._problem.weight.shape[0], most)
        for group, own in enumerate(self.scales):
            scale[group, :, : own.shape[1]] = own
        return PlaneWeights(torch.cat(self._patterns(), 1), scale.transpose(0, 1).contiguous())
