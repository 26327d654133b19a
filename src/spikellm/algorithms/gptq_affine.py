"""GPTQ of integers with a zero-point (Frantar et al., ICLR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem, ScaleCodes, descend_in_turn
from spikellm.quantization.affine import AffineWeights, codes_in_range, weight_range

_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a range, tried where it is searched


@column_coders.register("affine")
class AffineCoder(ColumnCoder):
    """Ranges by row and group from the weights as they came, or where some are pruned from those
    that remain; searched if the recipe says so.
    """

    options = ("search_range", "descents")

    def code(self, problem: GPTQProblem) -> AffineWeights:
        """Coded from ``w + zero·scale``, so that a code is ``w/scale`` rounded."""
        weights = problem.settings.weights
        tops = [weights.top(steps) for steps in problem.steps]
        weight = problem.remaining()
        low, high = weight_range(weight, problem.groups)
        if problem.options.search_range:
            low, high = _searched_range(problem._replace(weight=weight), tops, low, high)
        _, scale, zero = codes_in_range(
            weight, tops, problem.groups, low, high, symmetric=weights.symmetric
        )
        least = [top % 2 if weights.symmetric else 0 for top in tops]
        lifted = problem.lifted(zero * scale)
        coded = ScaleCodes(lifted, scale, least, tops)
        lifted.propagate_error(coded.error)
        descend_in_turn(problem, coded, zero)
        codes = coded.codes.T.contiguous().to(torch.uint8)
        return AffineWeights(codes, coded.scale, zero.to(torch.uint8))


def _searched_range(
    problem: GPTQProblem, tops: list[int], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of each range, ``(out, groups)``, whose rounding and clipping lose least, weighted
    as error feedback weighs columns.
    """
    best, best_error = torch.ones_like(low), torch.full_like(low, torch.inf)
    for share in _SHARES:
        codes, scale, zero = codes_in_range(
            problem.weight,
            tops,
            problem.groups,
            low * share,
            high * share,
            symmetric=problem.settings.weights.symmetric,
        )
        lost = (
            (codes - zero[:, problem.owner]) * scale[:, problem.owner] - problem.weight
        ).square_() * problem.importance
        error = torch.stack([lost[:, start:stop].sum(1) for start, stop in problem.groups], 1)
        better = error < best_error
        best, best_error = torch.where(better, share, best), torch.where(better, error, best_error)
    return low * best, high * best
