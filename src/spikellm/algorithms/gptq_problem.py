"""One layer to be coded with error feedback, as the coders of :mod:`spikellm.algorithms.gptq` see
it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.algorithms.step_budget import importance_of
from spikellm.models.swap import spiking_like
from spikellm.nn.channels import Groups
from spikellm.nn.formats.partly_binary import PartlyBinaryWeights
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import codes_in_range, weight_range
from spikellm.quantization.column_update import CodeColumn, propagate_error
from spikellm.quantization.rounding import half_up
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


def partly_binary_layer(module: nn.Module, problem: GPTQProblem, groups: Groups) -> SpikingLinear:
    """PB-LLM: salient by ``w²/[U]_jj²``, the others ``±mean|w|`` of their row (and group).

    Error feedback over both.
    """
    weight, settings = problem.weight, problem.settings.weights
    score = weight.square() * problem.importance
    count = max(1, round(settings.salient_rate * weight.numel()))
    salient = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    salient[torch.sort(score.flatten(), descending=True, stable=True).indices[:count]] = True
    salient = salient.view_as(weight)
    binary = (~salient).float()
    scale = torch.stack(
        [
            (weight.abs() * binary)[:, a:b].sum(1) / binary[:, a:b].sum(1).clamp(min=1)
            for a, b in problem.groups
        ],
        dim=1,
    ).clamp(min=torch.finfo(torch.float32).tiny)
    whole = [(0, weight.shape[1])]
    top = settings.top(1)
    _, fine_scale, fine_zero = codes_in_range(weight, [top], whole, *weight_range(weight, whole))
    positive, codes = torch.empty_like(salient), torch.zeros_like(weight)

    def code(column: int, w: Tensor, error: Tensor) -> None:
        q = half_up(w / fine_scale[:, 0]).add_(fine_zero[:, 0]).clamp_(0, top)
        codes[:, column], positive[:, column] = q, w >= 0
        coarse = torch.where(w >= 0, 1.0, -1.0) * scale[:, problem.owner[column]]
        torch.sub(
            w,
            torch.where(salient[:, column], (q - fine_zero[:, 0]) * fine_scale[:, 0], coarse),
            out=error,
        )

    problem.propagate_error(code)
    layer = spiking_like(module, problem.settings, sizes=(count,))
    layer.set_groups(groups.channel)
    layer.set_weights(
        PartlyBinaryWeights(
            salient, positive, scale, codes.to(torch.uint8), fine_scale, fine_zero.to(torch.uint8)
        )
    )
    return layer
