"""GPTQ of ternary spikes whose columns take different numbers of steps.

The second half of SpikeLLM (§4, "GPTQ pipeline") was never released; this is reconstructed from the
paper (see docs/additive.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem, code_by_scale
from spikellm.algorithms.step_budget import spend_in_layer
from spikellm.nn.formats.ternary import plane_sizes
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.ternary import refit_scales, search_scale
from spikellm.recipe.base import WeightOptions

_ENOUGH = 1e-3  # relative gain below which fitting stops


@column_coders.register("ternary")
class TernaryCoder(ColumnCoder):
    """Codes and scales fitted in turn until the layer's error stops falling."""

    options = ("rounds",)

    def column_steps(
        self, chosen: Tensor | None, weight: Tensor, importance: Tensor, settings: WeightOptions
    ) -> Tensor:
        if chosen is not None:
            return chosen
        return spend_in_layer(weight, importance, settings.budget)

    def code(self, problem: GPTQProblem) -> AffineWeights:
        """From searched scales on; the best pair is kept."""
        problem, importance = problem._replace(hessian=problem.hessian.float()), problem.importance
        scale = torch.cat(
            [
                search_scale(problem.weight[:, start:stop], importance[start:stop], steps)
                for (start, stop), steps in zip(problem.groups, problem.steps, strict=True)
            ],
            dim=1,
        )
        best, best_error = (torch.zeros_like(problem.weight), scale), float("inf")
        for _ in range(problem.options.rounds):
            codes = code_by_scale(
                problem, scale, [-steps for steps in problem.steps], problem.steps
            )
            scale = refit_scales(problem.weight, codes, problem.hessian, problem.groups, scale)
            error = problem.error(codes * scale[:, problem.owner])
            gained = best_error - error
            if gained > 0:
                best, best_error = (codes, scale), error
            if gained <= _ENOUGH * error:
                break
        codes, scale = best
        return AffineWeights(
            codes.to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.uint8)
        )

    def sizes(self, weights: AffineWeights, column_steps: Tensor | None) -> tuple[int, ...]:
        return () if column_steps is None else plane_sizes(column_steps)
