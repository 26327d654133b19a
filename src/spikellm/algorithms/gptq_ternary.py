"""GPTQ of ternary spikes whose columns take different numbers of steps.

The second half of SpikeLLM (§4, "GPTQ pipeline") was never released; this is reconstructed from the
paper (see docs/additive.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem, ScaleCodes
from spikellm.algorithms.step_budget import spend_in_layer
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.ternary import refit_scales, search_scale
from spikellm.recipe.base import WeightOptions

_ENOUGH = 1e-3  # relative gain below which fitting stops


@column_coders.register("ternary")
class TernaryCoder(ColumnCoder):
    """Codes and scales fitted in turn until the layer's error stops falling."""

    options = ("rounds", "descents")

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
        least = [-steps for steps in problem.steps]
        best, best_error = (torch.zeros_like(problem.weight), scale), float("inf")
        for _ in range(problem.options.rounds):
            coded = ScaleCodes(problem, scale, least, problem.steps)
            problem.propagate_error(coded.error)
            codes, scale = self._refitted(problem, coded, scale)
            error = problem.error(codes * scale[:, problem.owner])
            gained = best_error - error
            if gained > 0:
                best, best_error = (codes, scale), error
            if gained <= _ENOUGH * error:
                break
        codes, scale = self._descended(problem, *best)
        return AffineWeights(
            codes.to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.uint8)
        )

    def _descended(
        self, problem: GPTQProblem, codes: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales after coordinate descent on one and least squares of the other."""
        coded = ScaleCodes(problem, scale, [-steps for steps in problem.steps], problem.steps)
        for _ in range(problem.options.descents):
            if not problem.descend(codes * scale[:, problem.owner], coded.value):
                break
            codes, scale = self._refitted(problem, coded, scale)
            coded.scale(scale)
        return codes, scale

    def _refitted(
        self, problem: GPTQProblem, coded: ScaleCodes, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        codes = coded.codes.T.contiguous()
        return codes, refit_scales(problem.weight, codes, problem.hessian, problem.groups, scale)
