"""Ternary codes for weights: ``w ≈ α·q``, ``q = Σ_t s(t)``, ``s(t) ∈ {−1, 0, +1}``: T steps of a
column reach ``−T … T``.

α is one number a row and group of columns. Given the codes it is fitted to the Hessian-weighted
error ``(w − αq) H (w − αq)ᵀ`` by least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.quantization.rounding import half_up

_COARSE, _FINE = 16, 9  # scales tried over the whole range, and around the best of them
_LEAST = 0.15  # of the scale that reaches the largest weight
SEARCHED = 1024  # at most so many columns for the search of a scale, and rows for an error


def ternary_codes(weight: Tensor, scale: Tensor, steps: int) -> Tensor:
    """``clip(round(w/α), −T, T)``, float32 of the shape of ``weight``.

    ``scale`` broadcasts to it.
    """
    units = weight / scale
    return half_up(units.abs()).clamp_(max=steps).copysign_(units)


def search_scale(weight: Tensor, importance: Tensor, steps: int) -> Tensor:
    """The scale of each row that minimises ``Σ_j importance_j (w_j − α q_j)²``, searched on a grid,
    coarse and then fine: ``(out, 1)``, positive.

    Args:
        weight: ``(out, columns)`` that share the scale of their row; evenly spread columns where
            there are very many.
        importance: ``(columns,)``, not negative.
    """
    stride = -(-weight.shape[1] // SEARCHED)
    weight, importance = weight[:, ::stride].abs(), importance[::stride].unsqueeze(1)
    largest = weight.amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0) / steps
    best, best_error = unit, torch.full_like(unit, torch.inf)
    for shares in (
        torch.linspace(1.0, _LEAST, _COARSE),
        torch.linspace(1.0, -1.0, _FINE) * ((1 - _LEAST) / (_COARSE - 1)),
    ):
        around = 0 if shares[-1] > 0 else best
        for share in shares.tolist():
            scale = unit * share + around
            codes = torch.div(weight, scale).round_().clamp_(max=steps)
            error = torch.addcmul(weight, codes, scale, value=-1).square_() @ importance
            better = error < best_error
            best, best_error = (
                torch.where(better, scale, best),
                torch.where(better, error, best_error),
            )
    return best


def refit_scales(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    groups: list[tuple[int, int]],
    scale: Tensor,
    sweeps: int = 2,
) -> Tensor:
    """Scales fitted by least squares to the Hessian-weighted error, given codes.

    Group after group, twice over.

    Args:
        weight, codes: ``(out, in)``, float32.
        hessian: ``XᵀX`` up to a factor, float32, ``(in, in)``.
        groups: ``(start, stop)`` of the columns that share a scale in each row.
        scale: ``(out, groups)`` to start from; a group without spikes in a row, or whose best scale
            is not positive, keeps it.
    """
    scale, residual = scale.clone(), weight.clone()
    for group, (start, stop) in enumerate(groups):
        residual[:, start:stop] -= codes[:, start:stop] * scale[:, group : group + 1]
    for _ in range(sweeps):
        for group, (start, stop) in enumerate(groups):
            q = codes[:, start:stop]
            power = ((q @ hessian[start:stop, start:stop]) * q).sum(1)
            step = ((residual @ hessian[:, start:stop]) * q).sum(1) / power
            wanted = scale[:, group] + step
            step = torch.where((power > 0) & torch.isfinite(step) & (wanted > 0), step, 0.0)
            scale[:, group] += step
            residual[:, start:stop] -= q * step.unsqueeze(1)
    return scale


def step_errors(
    weight: Tensor, importance: Tensor, most: int, rows: Tensor | None = None
) -> Tensor:
    """Error of every column if all columns took 1, 2, … steps: ``importance_c · Σ_i rows_i (w_ic −
    α_i q_ic)²``, ``(most, in)``.

    Args:
        rows: what an error in each output costs, ``(out,)``; 1 each by default. Evenly spread rows
            stand for all where there are very many.
    """
    stride = -(-weight.shape[0] // SEARCHED)
    share = weight.shape[0] / len(weight[::stride])
    rows = (weight.new_ones(weight.shape[0]) if rows is None else rows)[::stride] * share
    weight, errors = weight[::stride], []
    for steps in range(1, most + 1):
        scale = search_scale(weight, importance, steps)
        errors.append(
            rows @ (weight - scale * ternary_codes(weight, scale, steps)).square_() * importance
        )
    return torch.stack(errors)
