"""GPTQ of ternary spikes whose columns take different numbers of steps.

The second half of SpikeLLM (§4, "GPTQ pipeline") was never released; this is reconstructed from the
paper (see docs/additive.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem, ScaleCodes, descend_in_turn, refitted
from spikellm.algorithms.step_budget import spend_in_layer
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.ternary import search_scale
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
        return spend_in_layer(weight, importance, settings, self.step_errors)

    def code(self, problem: GPTQProblem) -> AffineWeights:
        """From searched scales on; the best pair goes on to coordinate descent."""
        problem, importance = problem._replace(hessian=problem.hessian.float()), problem.importance
        weight = problem.remaining()
        scale = torch.cat(
            [
                search_scale(weight[:, start:stop], importance[start:stop], steps)
                for (start, stop), steps in zip(problem.groups, problem.steps, strict=True)
            ],
            dim=1,
        )
        best, best_error = self._coded(problem, scale), float("inf")
        for _ in range(problem.options.rounds):
            coded = self._coded(problem, scale)
            problem.propagate_error(coded.error)
            scale = refitted(problem, coded.codes.T, scale)
            coded.rescale(scale)
            error = problem.error(coded.codes.T * scale[:, problem.owner])
            gained = best_error - error
            if gained > 0:
                best, best_error = coded, error
            if gained <= _ENOUGH * error:
                break
        zero = torch.zeros_like(best.scale)
        descend_in_turn(problem, best, zero)
        codes = best.codes.T.contiguous().to(torch.int8)
        return AffineWeights(codes, best.scale, zero.to(torch.uint8))

    def _coded(self, problem: GPTQProblem, scale: Tensor) -> ScaleCodes:
        return ScaleCodes(problem, scale, [-steps for steps in problem.steps], problem.steps)
