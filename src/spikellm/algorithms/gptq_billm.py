"""BiLLM's weights (Huang et al., ICML 2024) under error feedback.

Of the published code this keeps the structure and repairs the search: with its Hessian metric it
binarizes the scores ``w²/[U]_jj²`` to find how many columns are salient and where magnitudes are
split, not the weights. Here weights are binarized, errors weighed by ``1/[U]_jj²``, and every row
has a split of its own. There are no means, so that layers are additions alone.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from spikellm.algorithms.gptq_coders import ColumnCoder, column_coders
from spikellm.algorithms.gptq_problem import GPTQProblem
from spikellm.nn.formats.bcq import PlaneWeights
from spikellm.nn.formats.billm import REST, SALIENT
from spikellm.nn.formats.billm_options import BillmOptions
from spikellm.quantization.affine import column_groups
from spikellm.quantization.bcq import Rounding
from spikellm.recipe.base import WeightOptions

_SPLITS = tuple(step / 10 for step in range(1, 10))  # of a row's largest magnitude
_COUNTS = 6  # of salient columns that are tried in a group
_LEAST = 2.0**-100


@column_coders.register("billm")
class BillmCoder(ColumnCoder):
    """Salient columns and magnitudes searched group by group, scales as they came."""

    has_zero = False

    def column_steps(
        self, chosen: Tensor | None, weight: Tensor, importance: Tensor, settings: WeightOptions
    ) -> Tensor:
        """2 for salient columns, else 1."""
        options = cast(BillmOptions, settings)
        scores = weight.square() * importance
        searched = scores if options.search == "scores" else weight
        costs = torch.ones_like(importance) if options.search == "scores" else importance
        steps = torch.full_like(importance, REST, dtype=torch.uint8)
        for start, stop in column_groups(weight.shape[1], options.group_size):
            ranked = scores[:, start:stop].sum(0).argsort(descending=True, stable=True) + start
            most = int(options.most_salient * (stop - start))
            counts = sorted({round(most * part / _COUNTS) for part in range(_COUNTS + 1)})
            lost = [
                _residual(searched[:, ranked[:count]], costs[ranked[:count]])[1]
                + _split(searched[:, ranked[count:]], costs[ranked[count:]])[1].sum()
                for count in counts
            ]
            steps[ranked[: counts[int(torch.stack(lost).argmin())]]] = SALIENT
        return steps

    def code(self, problem: GPTQProblem) -> PlaneWeights:
        weight, importance = problem.weight, problem.importance
        options = cast(BillmOptions, problem.settings.weights)
        rounding = Rounding(options.scale_bits, options.scale_terms)
        scales = []
        for (start, stop), kind in zip(problem.groups, problem.steps, strict=True):
            part, costs = weight[:, start:stop], importance[start:stop]
            if kind == SALIENT:
                found = _residual(part, costs)[0]
            elif options.search == "scores":
                scores = part.square() * costs
                found = _means(part.abs(), scores > _split(scores, torch.ones_like(costs))[2])
            else:
                found = _split(part, costs)[0]
            scales.append(rounding(found.clamp(min=_LEAST)))
        patterns = torch.zeros(weight.shape[::-1], dtype=torch.uint8, device=weight.device)

        def code(column: int, w: Tensor, error: Tensor) -> None:
            group = problem.owner[column]
            first, second = scales[group].unbind(1)
            size, positive = w.abs(), w >= 0
            if problem.steps[group] == SALIENT:
                rest = size - first
                value, bit = first + torch.where(rest >= 0, second, -second), rest >= 0
                bit = bit == positive  # the second sign, of the weight itself
            else:
                bit = (size - second).abs() < (size - first).abs()
                value = torch.where(bit, second, first)
            patterns[column] = positive.to(torch.uint8) + 2 * bit.to(torch.uint8)
            torch.sub(w, torch.where(positive, value, -value), out=error)

        problem.propagate_error(code)
        return PlaneWeights(patterns.T.contiguous(), torch.stack(scales, 1))


def _residual(part: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Scales ``(out, 2)`` of two planes, the second of what the first leaves, and the error."""
    if part.shape[1] == 0:
        return part.new_ones(len(part), 2), part.new_zeros(())
    size = part.abs()
    first = size.mean(1, keepdim=True)
    second = (size - first).abs().mean(1, keepdim=True)
    left = (size - first).abs() - second
    return torch.cat([first, second], 1), (left.square() @ costs).sum()


def _split(part: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales ``(out, 2)`` of small and large magnitudes, errors ``(out,)`` and where they are
    split, ``(out, 1)``, of the best of some splits for each row.
    """
    size = part.abs()
    if size.shape[1] == 0:
        return size.new_ones(len(size), 2), size.new_zeros(len(size)), size.new_zeros(len(size), 1)
    largest = size.amax(1, keepdim=True)
    best, at = size.new_ones(len(size), 2), torch.zeros_like(largest)
    least = torch.full_like(largest[:, 0], torch.inf)
    for share in _SPLITS:
        large = size > share * largest
        means = _means(size, large)
        lost = (size - torch.where(large, means[:, 1:], means[:, :1])).square() @ costs
        better = lost < least
        best = torch.where(better.unsqueeze(1), means, best)
        at = torch.where(better.unsqueeze(1), share * largest, at)
        least = torch.minimum(lost, least)
    return best, least, at


def _means(size: Tensor, large: Tensor) -> Tensor:
    """Mean magnitude of what is not large and of what is, ``(out, 2)``; the other one where there
    is none.
    """
    count = large.sum(1)
    high = (size * large).sum(1) / count.clamp(min=1)
    low = (size * ~large).sum(1) / (size.shape[1] - count).clamp(min=1)
    low, high = torch.where(count == size.shape[1], high, low), torch.where(count == 0, low, high)
    return torch.stack([low, high], 1)
