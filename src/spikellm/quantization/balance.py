"""The linear map behind which a vector loses least when it is coded.

Coded behind a map P and a rotation that spreads it evenly, x (second moments C) gets noise whose
variance follows ``tr(P C Pᵀ)``, and what multiplies it (second moments G; of layers ``WᵀW``) feels
that as ``tr(P⁻ᵀ G P⁻¹)``. By Cauchy and Schwarz the product is least, ``(tr (C^½ G C^½)^½)²``,
where

    PᵀP = C⁻¹ # G = C^-½ (C^½ G C^½)^½ C^-½

the geometric mean of C⁻¹ and G: the map of a balanced realization (Moore 1981), behind which both
sides have the same second moments. Among diagonal maps it is the scale of
:func:`spikellm.transforms.equalization.even_scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHRINK = 1e-2  # of moments towards their diagonal's mean: a sample has no more to say
_RANGE = 64.0  # how far scales of one map may lie from their geometric mean


def balanced_map(moments: Tensor, energy: Tensor) -> Tensor:
    """The symmetric P of least loss, float64 ``(..., n, n)``.

    Args:
        moments: C, ``(..., n, n)``.
        energy: G, ``(..., n, n)``.
    """
    root, inverse = _roots(_shrunk(moments))
    middle, _ = _roots(root @ _shrunk(energy) @ root)
    values, vectors = torch.linalg.eigh(inverse @ middle @ inverse)
    scales = values.clamp(min=1e-300).sqrt()
    centre = scales.log().mean(-1, keepdim=True).exp()
    scales = torch.clamp(scales / centre, 1 / _RANGE, _RANGE) * centre
    found: Tensor = (vectors * scales.unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return found


def _shrunk(matrix: Tensor) -> Tensor:
    mean = matrix.diagonal(dim1=-2, dim2=-1).double().mean(-1).clamp(min=1e-30)
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    return (1 - _SHRINK) * matrix.double() + _SHRINK * mean[..., None, None] * identity


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.maximum(values, values.amax(-1, keepdim=True) * 1e-12).sqrt().unsqueeze(-2)
    turned = vectors.transpose(-1, -2)
    return (vectors * values) @ turned, (vectors / values) @ turned
