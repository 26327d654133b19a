"""Binary-coded weights: ``w ≈ Σ_p α_p·b_p`` with planes ``b_p ∈ {−1, +1}`` and scales α_p > 0, one
of each plane for a row and group of columns (BCQ; Xu et al., ICLR 2018, in the form of ShiftAddLLM;
You et al., NeurIPS 2024).

k planes reach 2^k values about zero, not evenly spaced. A *pattern* is a weight's bits: bit p is
set where ``b_p = +1``.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.quantization.powers import nearest_sum_of_powers
from spikellm.quantization.ternary import SEARCHED

MOST_PLANES = 4
_ROUNDS = 20  # of weights and scales in turn, before error feedback
_ROUNDED = 4  # rounds after them, in which scales are as they are stored
_STILL = 1e-3  # relative change of scales below which they are fitted no more
_RIDGE = 1e-6  # added to the Gram matrix of planes, as a share of its mean diagonal
_LEAST = 2.0**-100  # scale

_NEAR = {1: 2**0.5, 2: 1.1, 3: 1.03}
"""By what scales are moved to meet their neighbours among sums of so many powers of two."""


class Rounding(NamedTuple):
    """What of a scale is stored: a sum of ``terms`` powers of two, or ``bits`` bits."""

    bits: int = 32
    terms: int | None = None

    def __call__(self, scale: Tensor) -> Tensor:
        """The nearest scale that is stored."""
        scale = scale.clamp(min=_LEAST)
        if self.terms is not None:
            return nearest_sum_of_powers(scale, self.terms)
        return scale.to(torch.bfloat16).float() if self.bits == 16 else scale

    def around(self, scale: Tensor) -> list[Tensor]:
        """Stored scales around ``(out, planes)``, which may lose less together than each nearest
        one does: all combinations of neighbours.
        """
        if self.terms is None:
            return [self(scale)]
        by = _NEAR[self.terms]
        factors = product((1.0, 1 / by, by), repeat=scale.shape[1])
        return [self(scale * scale.new_tensor(one)) for one in factors]


def signs_of(patterns: Tensor, planes: int) -> Tensor:
    """Planes of patterns, float32 {−1, 1}, ``(planes, …)``."""
    places = torch.arange(planes, device=patterns.device).view(-1, *(1,) * patterns.dim())
    return ((patterns.int() >> places) & 1).float().mul_(2).sub_(1)


class PlaneTable:
    """The values of every row in one group of columns.

    Args:
        scale: ``(out, planes)``, positive.
    """

    def __init__(self, scale: Tensor) -> None:
        patterns = torch.arange(1 << scale.shape[1], device=scale.device)
        values, order = (scale @ signs_of(patterns, scale.shape[1])).sort(dim=1, stable=True)
        self._values, self._patterns = values, order.to(torch.uint8)
        self._middles = ((values[:, 1:] + values[:, :-1]) / 2).contiguous()
        sizes = values[:, values.shape[1] // 2 :]  # values are the same about zero
        self._sizes = sizes.T.contiguous().unbind()
        self._cuts = ((sizes[:, 1:] + sizes[:, :-1]) / 2).T.contiguous().unbind()

    def nearest(self, w: Tensor) -> Tensor:
        """Values nearest to one weight of each row, ``(out,)``; between two, the smaller one."""
        size, found = w.abs(), self._sizes[0]
        for cut, value in zip(self._cuts, self._sizes[1:], strict=True):
            found = torch.where(size > cut, value, found)
        return found.copysign(w)

    def patterns(self, weight: Tensor) -> Tensor:
        """Patterns, uint8, nearest to weights, ``(out, columns)``."""
        return self._patterns.gather(1, self._places(weight))

    def rounded(self, weight: Tensor) -> Tensor:
        """What those patterns stand for, ``(out, columns)``."""
        return self._values.gather(1, self._places(weight))

    def _places(self, weight: Tensor) -> Tensor:
        return torch.searchsorted(self._middles, weight.contiguous())


def fit_scales(weight: Tensor, importance: Tensor, planes: int, rounding: Rounding) -> Tensor:
    """Scales of each row that minimise ``Σ_j importance_j (w_j − Σ_p α_p b_pj)²``, planes and
    scales fitted in turn from a greedy start: ``(out, planes)``, positive.

    Args:
        weight: ``(out, columns)`` that share their scales.
        importance: ``(columns,)``, not negative.
    """
    total, rest, greedy = importance.sum().clamp(min=torch.finfo(torch.float32).tiny), weight, []
    for _ in range(planes):
        size = (rest.abs() @ importance / total).unsqueeze(1)
        greedy.append(size)
        rest = rest - torch.where(rest > 0, size, -size)
    scale = torch.cat(greedy, 1).clamp(min=_LEAST)
    for _ in range(_ROUNDS):
        before, scale = scale, _refined(weight, importance, scale)
        if float((scale / before - 1).abs().mean()) < _STILL:
            break
    best, least = scale, torch.full_like(scale[:, :1], torch.inf)
    for _ in range(_ROUNDED if rounding.terms is not None else 1):
        for tried in rounding.around(scale):
            error = (weight - PlaneTable(tried).rounded(weight)).square_()
            lost = error @ importance.unsqueeze(1)
            best, least = torch.where(lost < least, tried, best), torch.minimum(lost, least)
        scale = _refined(weight, importance, best)
    return best


def _refined(weight: Tensor, importance: Tensor, scale: Tensor) -> Tensor:
    """Scales that fit the patterns which other scales give."""
    signs = signs_of(PlaneTable(scale).patterns(weight), scale.shape[1])
    weighted = signs * importance
    gram = torch.einsum("poc,qoc->opq", weighted, signs)
    return solved(gram, torch.einsum("poc,oc->op", weighted, weight), scale)


def solved(gram: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """``gram⁻¹ wanted`` of every row, ``(out, planes)``; ``scale`` where that is not positive."""
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)
    damped = gram + torch.diag_embed(ridge.clamp(min=1e-30).unsqueeze(1).expand_as(scale))
    found, failed = torch.linalg.solve_ex(damped.double(), wanted.double())
    good = (torch.isfinite(found) & (found > _LEAST)).all(1) & (failed == 0)
    return torch.where(good.unsqueeze(1), found.float(), scale)


def refit_scales(
    residual: Tensor,
    signs: Tensor,
    hessian: Tensor,
    columns: slice,
    scale: Tensor,
    rounding: Rounding,
) -> Tensor:
    """Scales of one group fitted to the Hessian-weighted error by least squares, given planes; a
    row whose error that would not lower keeps its own.

    Args:
        residual: what the weights of all columns still miss, ``(out, in)``; changed in place.
        signs: planes of the group, ``(planes, out, columns)``.
        hessian: ``XᵀX`` up to a factor, float32, ``(in, in)``.
        columns: of the group.
        scale: ``(out, planes)`` so far.
    """
    weighted = signs @ hessian[columns, columns]
    gram = torch.einsum("poc,qoc->opq", weighted, signs)
    pull = torch.einsum("poc,oc->op", signs, residual @ hessian[:, columns])
    own = torch.einsum("opq,oq->op", gram, scale)
    joint = solved(gram, pull + own, scale)
    best, least = scale, torch.zeros_like(scale[:, 0])
    for tried in (*rounding.around(joint), _in_turn(gram, pull + own, rounding(joint), rounding)):
        step = tried - scale
        change = (torch.einsum("opq,oq->op", gram, step) - 2 * pull).mul_(step).sum(1)
        better = (change < least).unsqueeze(1)
        best = torch.where(better, tried, best)
        least = torch.minimum(change, least)
    residual[:, columns] -= torch.einsum("poc,op->oc", signs, best - scale)
    return best


def _in_turn(gram: Tensor, wanted: Tensor, scale: Tensor, rounding: Rounding) -> Tensor:
    """One scale after the other, rounded before the next is fitted, so that what rounding loses is
    made up for.
    """
    scale = scale.clone()
    for _ in range(2):
        for plane in range(scale.shape[1]):
            others = torch.einsum("oq,oq->o", gram[:, plane], scale)
            power = gram[:, plane, plane]
            found = scale[:, plane] + (wanted[:, plane] - others) / power
            good = torch.isfinite(found) & (found > _LEAST)
            scale[:, plane] = torch.where(good, rounding(found), scale[:, plane])
    return scale


def plane_errors(
    weight: Tensor, importance: Tensor, most: int, rows: Tensor | None = None
) -> Tensor:
    """Error of every column if all columns took 1, 2, … planes, as
    :func:`spikellm.quantization.ternary.step_errors`: ``(most, in)``.
    """
    stride = -(-weight.shape[0] // SEARCHED)
    share = weight.shape[0] / len(weight[::stride])
    rows = (weight.new_ones(weight.shape[0]) if rows is None else rows)[::stride] * share
    weight, errors = weight[::stride], []
    for planes in range(1, most + 1):
        scale = fit_scales(weight, importance, planes, Rounding())
        lost = (weight - PlaneTable(scale).rounded(weight)).square_()
        errors.append(rows @ lost * importance)
    return torch.stack(errors)
