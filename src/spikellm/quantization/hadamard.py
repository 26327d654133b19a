"""Orthogonal transforms that spread a vector over its channels.

:func:`spread` is fused into weights. For a size ``n = 2**a · m`` with odd m it is ``(H ⊗ C) / √n``:
H of Sylvester (entries ±1), C of Hartley (``cos + sin`` of ``2πij/m``, entries at most √2). It is
symmetric, orthogonal, its own inverse, and its first row is constant.

:func:`mix` runs with the model, so it consists of additions alone. With p the largest power of two
that fits into the size, it applies H to the first p channels and then, after the signs of Rudin and
Shapiro, to the last p; where p is the whole size, H once. Without the signs the second application
would undo much of the first, since parts of a row of H are close to other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def factors(size: int) -> tuple[int, int]:
    """The power of two in a size, and the odd rest."""
    power = size & -size
    return power, size // power


@cache
def hartley(size: int) -> Tensor:
    """Hartley's matrix, not normalised: float64 ``(size, size)``."""
    index = torch.arange(size, dtype=torch.float64)
    angle = torch.outer(index, index).remainder(size) * (2 * math.pi / size)
    return angle.cos() + angle.sin()


def walsh(x: Tensor) -> Tensor:
    """``x H`` of ``(rows, 2**a)``, not normalised, in Sylvester's order, in ``2**a · a`` additions
    a row.
    """
    rows, size = x.shape
    half = 1
    while half < size:
        first, second = x.reshape(rows, size // (2 * half), 2, half).unbind(2)
        x = torch.stack((first + second, first - second), 2)
        half *= 2
    return x.reshape(rows, size)


def largest_power(size: int) -> int:
    """The largest power of two that is not above a size."""
    return 1 << (size.bit_length() - 1)


def mix(x: Tensor, transform: Callable[[Tensor], Tensor] = walsh) -> Tensor:
    """A rotation of ``(..., n)`` by additions, in the type of ``x`` (float32 or float64).

    ``transform`` computes :func:`walsh`. Not its own inverse where n is no power of two.
    """
    size = x.shape[-1]
    power = largest_power(size)
    y = x.reshape(-1, size)
    root = x.new_full((), math.sqrt(power))  # CUDA multiplies by the reciprocal of a number
    if power == size:
        return (transform(y) / root).reshape(x.shape)
    y = torch.cat([transform(y[:, :power]) / root, y[:, power:]], 1)
    signs = shapiro(power).to(device=x.device, dtype=x.dtype)
    last = transform(y[:, size - power :] * signs) / root
    return torch.cat([y[:, : size - power], last], 1).reshape(x.shape)


def unmix(y: Tensor, run: Callable[[Tensor], Tensor] = mix) -> Tensor:
    """Inverse of :func:`mix`, which is its transpose; ``run`` computes that function."""
    size = y.shape[-1]
    power = largest_power(size)
    if power == size:
        return run(y)
    last = run(y[..., size - power :]) * shapiro(power).to(device=y.device, dtype=y.dtype)
    x = torch.cat([y[..., : size - power], last], -1)
    return torch.cat([run(x[..., :power]), x[..., power:]], -1)


@cache
def shapiro(size: int) -> Tensor:
    """The sequence of Rudin and Shapiro, whose Walsh transform is flat: −1 to the number of times
    that two neighbouring bits of an index are set, float32 ``(size,)``.
    """
    return torch.tensor(
        [1 - 2 * ((index & index >> 1).bit_count() % 2) for index in range(size)],
        dtype=torch.float32,
    )


def spread(x: Tensor) -> Tensor:
    """``x (H ⊗ C) / √n`` of ``(..., n)``, in the type of ``x`` (float32 or float64)."""
    power, rest = factors(x.shape[-1])
    y = x.reshape(-1, power, rest)
    if rest > 1:
        y = y @ hartley(rest).to(device=x.device, dtype=x.dtype)
    y = walsh(y.transpose(1, 2).reshape(-1, power)).view(-1, rest, power).transpose(1, 2)
    return (y / math.sqrt(x.shape[-1])).reshape(x.shape)


def random_signs(size: int, seed: int) -> Tensor:
    """Signs ±1, float64 ``(size,)``; the first is +1, which alone decides nothing."""
    drawn = (
        torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    )
    return drawn.mul(drawn[:1])


def turn(x: Tensor, signs: Tensor) -> Tensor:
    """``x S D S`` of ``(..., n)``, S as in :func:`spread`, D the signs: a random rotation that is
    its own inverse and, the first sign being +1, leaves the constant vector as it is.

    So it passes through layer normalisation as through RMS normalisation: means and variances stay.
    """
    return spread(spread(x) * signs.to(device=x.device, dtype=x.dtype))
