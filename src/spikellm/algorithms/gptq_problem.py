"""One layer to be coded with error feedback, as the coders of
:mod:`spikellm.algorithms.gptq_coders` see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.gptq_pruning import Pruning
from spikellm.algorithms.step_budget import importance_of
from spikellm.quantization.column_update import CodeColumn, permuted, propagate_error
from spikellm.quantization.coordinate_descent import descend, pull_of
from spikellm.quantization.ternary import refit_scales
from spikellm.recipe import LinearRecipe

_STILL = 5e-3  # relative change of scales below which they are fitted no more


class GPTQProblem(NamedTuple):
    """One layer to be coded, columns in stored order.

    Attributes:
        weight: float32, ``(out, in)``.
        hessian: ``XᵀX``, ``(in, in)``.
        order: stored column of each column in the order of coding, ``(in,)``.
        factor: of the inverse Hessian, in the order of coding.
        groups: stored columns that share a scale.
        owner: group of every stored column.
        steps: T of every group.
        settings, options: of the layer.
        pruning: which weights are zero; None where any may be anything.
        zero: what stands for a weight of zero, ``(out, groups)``; 0 by default.
    """

    weight: Tensor
    hessian: Tensor
    order: Tensor
    factor: Tensor
    groups: list[tuple[int, int]]
    owner: list[int]
    steps: list[int]
    settings: LinearRecipe
    options: GptqOptions
    pruning: Pruning | None = None
    zero: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """What a squared error in a stored column costs, ``(in,)``."""
        return importance_of(self.factor, self.order)

    def lifted(self, zero: Tensor) -> GPTQProblem:
        """The same with ``zero`` ``(out, groups)`` added to every weight, for codes that start
        there.
        """
        return self._replace(weight=self.weight + zero[:, self.owner], zero=zero)

    def propagate_error(self, code: CodeColumn) -> None:
        """Error feedback, with columns named by their stored place.

        What is pruned is given to ``code`` as zero, whatever error feedback made of it.
        """
        places, code = self.order.tolist(), self._pruned(code)
        windows = None
        if self.pruning is not None:
            zeros = None if self.zero is None else self.zero[:, self.owner][:, self.order].T
            windows = self.pruning.windows(zeros)
        propagate_error(
            self.weight[:, self.order],
            self.factor,
            lambda column, w, error: code(places[column], w, error),
            windows,
        )

    def _pruned(self, code: CodeColumn) -> CodeColumn:
        if self.pruning is None:
            return code
        marks, zeros = self.pruning.marks, self.zeros()

        def code_kept(column: int, w: Tensor, error: Tensor) -> None:
            kept = torch.where(marks[column], zeros[self.owner[column]], w)
            code(column, kept, error)
            error.add_(w - kept)

        return code_kept

    def zeros(self) -> Sequence[Tensor]:
        """What stands for a weight of zero, ``(out,)`` of each group."""
        if self.zero is None:
            return [self.weight.new_zeros(self.weight.shape[0])] * len(self.groups)
        return self.zero.T.contiguous().unbind()

    def remaining(self) -> Tensor:
        """The weights to be coded, ``(out, in)``: as they came, or where some are pruned, 0 there
        and elsewhere what error feedback of these zeros alone makes of them.
        """
        if self.pruning is None or self.pruning.decided:
            return self.weight
        values = torch.empty_like(self.weight.T)

        def keep(column: int, w: Tensor, error: Tensor) -> None:
            values[column] = w
            error.zero_()

        self._replace(pruning=self.pruning.anew()).propagate_error(keep)
        return values.T.contiguous()

    def error(self, values: Tensor) -> float:
        """Squared error of the layer's output with these weights in the place of its own."""
        difference = self.weight - values
        return float(((difference @ self.hessian) * difference).sum(dtype=torch.float64))


class ScaleCodes:
    """Codes ``clip(round(w/scale), least, most)`` of the columns of a problem.

    Args:
        scale: ``(out, groups)``.
        least, most: of each group.

    Attributes:
        codes: float32, ``(in, out)``, columns in stored order: a column at a time is contiguous.
        scale: as given, or by the last :meth:`rescale`.
    """

    def __init__(
        self, problem: GPTQProblem, scale: Tensor, least: list[int], most: list[int]
    ) -> None:
        self._owner, self._least, self._most = problem.owner, least, most
        self.codes = problem.weight.new_zeros(problem.weight.shape[::-1])
        self.rescale(scale)

    def rescale(self, scale: Tensor) -> None:
        """Take other scales; codes stay."""
        self.scale = scale
        self._scales = scale.T.contiguous().unbind()
        self._rates = _inverse(scale).T.contiguous().unbind()

    def error(self, column: int, w: Tensor, error: Tensor) -> None:
        """Code a column and write what it misses, as error feedback wants it."""
        group = self._owner[column]
        torch.addcmul(w, self._code(column, w), self._scales[group], value=-1, out=error)

    def value(self, column: int, w: Tensor, value: Tensor) -> None:
        """Code a column and write what it holds, as coordinate descent wants it."""
        torch.mul(self._code(column, w), self._scales[self._owner[column]], out=value)

    def _code(self, column: int, w: Tensor) -> Tensor:
        group = self._owner[column]
        return (
            torch.mul(w, self._rates[group], out=self.codes[column])
            .round_()
            .clamp_(self._least[group], self._most[group])
        )


def descend_in_turn(problem: GPTQProblem, coded: ScaleCodes, zero: Tensor) -> None:
    """Coordinate descent on codes and least squares of their scales, in turn.

    Args:
        problem: whose weights codes ``(q − zero)·scale`` stand for.
        coded: codes and scales to start from, which the better ones replace.
        zero: ``(out, groups)``.
    """
    if not problem.options.descents:
        return
    order, places = problem.order, problem.order.tolist()
    marks = None if problem.pruning is None else problem.pruning.marks
    pull = pull_of(permuted(problem.hessian, order), problem.options.percdamp)
    lift, moves = zero[:, problem.owner], True
    for _ in range(problem.options.descents):
        each, zeros = coded.scale[:, problem.owner], (zero * coded.scale).T.contiguous()

        def recode(column: int, w: Tensor, value: Tensor, zeros: Tensor = zeros) -> None:
            place = places[column]
            if marks is not None:
                w = torch.where(marks[place], zeros[problem.owner[place]], w)
            coded.value(place, w, value)

        _, changed = descend(
            (problem.weight + lift * each)[:, order],
            (coded.codes.T * each)[:, order],
            pull,
            recode,
        )
        if not changed:
            break
        if moves:
            before = coded.scale
            coded.rescale(refitted(problem, coded.codes.T - lift, before))
            moves = float((coded.scale / before - 1).abs().mean()) > _STILL


def refitted(problem: GPTQProblem, codes: Tensor, scale: Tensor) -> Tensor:
    """Scales fitted by least squares, given codes less their zero-points, ``(out, in)``."""
    return refit_scales(
        problem.weight, codes.contiguous(), problem.hessian.float(), problem.groups, scale
    )


def _inverse(scale: Tensor) -> Tensor:
    return (1 / scale).clamp_(
        max=torch.finfo(scale.dtype).max
    )  # finite also for the smallest scales
