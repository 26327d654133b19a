"""One layer to be coded with error feedback, as the coders of
:mod:`spikellm.algorithms.gptq_coders` see it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.step_budget import importance_of
from spikellm.quantization.column_update import CodeColumn, propagate_error
from spikellm.recipe import LinearRecipe


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

    @property
    def importance(self) -> Tensor:
        """What a squared error in a stored column costs, ``(in,)``."""
        return importance_of(self.factor, self.order)

    def propagate_error(self, code: CodeColumn) -> None:
        """Error feedback, with columns named by their stored place."""
        places = self.order.tolist()
        propagate_error(
            self.weight[:, self.order],
            self.factor,
            lambda column, w, error: code(places[column], w, error),
        )

    def error(self, values: Tensor) -> float:
        """Squared error of the layer's output with these weights in the place of its own."""
        difference = self.weight - values
        return float(((difference @ self.hessian) * difference).sum(dtype=torch.float64))


def code_by_scale(problem: GPTQProblem, scale: Tensor, least: list[int], most: list[int]) -> Tensor:
    """Codes ``clip(round(w/scale), least, most)`` with error feedback, float32 ``(out, in)``,
    columns in stored order; bounds are one of each group.
    """
    scales, rates = list(scale.T.contiguous()), list(_inverse(scale).T.contiguous())
    codes = problem.weight.new_empty(problem.weight.shape[::-1])  # (in, out): a column at a time
    columns = codes.unbind()

    def code(column: int, w: Tensor, error: Tensor) -> None:
        group = problem.owner[column]
        q = (
            torch.mul(w, rates[group], out=columns[column])
            .round_()
            .clamp_(least[group], most[group])
        )
        torch.addcmul(w, q, scales[group], value=-1, out=error)

    problem.propagate_error(code)
    return codes.T.contiguous()


def _inverse(scale: Tensor) -> Tensor:
    return (1 / scale).clamp_(
        max=torch.finfo(scale.dtype).max
    )  # finite also for the smallest scales
