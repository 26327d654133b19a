"""The linear map behind which a vector loses least when it is coded, and what that leaves.

Coded behind a map P and a rotation that spreads it evenly, x (second moments C) loses noise whose
variance follows ``tr(P C Pᵀ)``, and layers with ``G = WᵀW`` feel it as ``tr(P⁻ᵀ G P⁻¹)``. By Cauchy
and Schwarz the product is least, ``(tr (C^½ G C^½)^½)²``, where

    PᵀP = C⁻¹ # G = C^-½ (C^½ G C^½)^½ C^-½

the geometric mean of C⁻¹ and G: the map of a balanced realization (Moore 1981), with which inputs
and weights have the same second moments. Restricted to diagonal maps it is the scale of
:func:`spikellm.transforms.equalization.even_scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHRINK = 1e-2  # of moments towards their diagonal's mean: a sample has no more to say
_RANGE = 64.0  # how far scales of one map may lie apart from their geometric mean


def balanced_map(moments: Tensor, energy: Tensor) -> Tensor:
    """The symmetric P of least loss, of determinant 1, float64 ``(n, n)``.

    Args:
        moments: C, ``(n, n)``.
        energy: G, ``(n, n)``.
    """
    root, inverse = _powers(_shrunk(moments))
    middle, _ = _powers(root @ _shrunk(energy) @ root)
    values, vectors = torch.linalg.eigh(inverse @ middle @ inverse)
    scales = values.clamp(min=1e-300).sqrt()
    scales = (scales / scales.log().mean().exp()).clamp(1 / _RANGE, _RANGE)
    return (vectors * (scales / scales.log().mean().exp())) @ vectors.T


def _shrunk(matrix: Tensor) -> Tensor:
    mean = matrix.diagonal().mean().clamp(min=1e-300)
    identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    return (1 - _SHRINK) * matrix.double() + _SHRINK * mean * identity


def _powers(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=float(values.max()) * 1e-12).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
