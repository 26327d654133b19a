"""PB-LLM's partly binary weights (Shang et al., ICLR 2024) under error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.nn.formats.partly_binary import PartlyBinaryWeights
from spikellm.quantization.affine import codes_in_range, weight_range
from spikellm.quantization.rounding import half_up
from spikellm.recipe.base import WeightOptions


@column_coders.register("partly-binary")
class PartlyBinaryCoder(ColumnCoder):
    """Salient by ``w²/[U]_jj²``, the others ``±mean|w|`` of their row (and group)."""

    has_zero = False

    def column_steps(
        self, chosen: Tensor | None, weight: Tensor, importance: Tensor, settings: WeightOptions
    ) -> None:
        """None: single weights are salient, not columns."""

    def code(self, problem: GPTQProblem) -> PartlyBinaryWeights:
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
        _, fine_scale, fine_zero = codes_in_range(
            weight, [top], whole, *weight_range(weight, whole)
        )
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
        return PartlyBinaryWeights(
            salient, positive, scale, codes.to(torch.uint8), fine_scale, fine_zero.to(torch.uint8)
        )
