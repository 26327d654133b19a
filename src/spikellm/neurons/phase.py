"""Phase coding: a spike is worth a power of two by the moment at which it comes, so that a count of
b bits takes b moments, and as many spikes as it has ones.

    |n| = Σ_k s_k · 2^k,   the largest power first

Receivers double their sums from one moment to the next and add. In its canonical signed-digit form
(Reitwiesner 1960: digits −1, 0 and 1, no two neighbours of which differ from 0) a count has a third
of its digits left instead of half, of both signs, and sometimes one moment more: 15 = 16 − 1.

As dynamics: at the moment of 2^k a neuron fires where its membrane has reached 2^k thresholds, and
loses them (weighted spikes: Kim et al. 2018, https://doi.org/10.1016/j.neucom.2018.05.087). With
signed digits it fires where two thirds of that are reached, so that what is left may be negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Recoding = Literal["binary", "signed-digit"]
"""Digits of a magnitude: its bits, or the canonical signed digits."""


def places(top: int, recoding: Recoding) -> int:
    """Moments in which every count up to ``top`` is said."""
    return top.bit_length() if recoding == "binary" else max((3 * top).bit_length() - 1, 0)


def iterate_digits(count: Tensor, top: int, recoding: Recoding) -> Iterator[tuple[Tensor, int]]:
    """Digits of counts, the largest power first.

    Args:
        count: integers up to ``top`` in magnitude.

    Returns:
        ``(digits, k)``: int8 {−1, 0, 1} of the shape of ``count``, each worth 2^k.
    """
    size, negative = count.abs().to(torch.int32), count < 0
    plus, minus = size, torch.zeros_like(size)
    if recoding == "signed-digit":
        thrice = size + (size << 1)
        plus, minus = (thrice & ~size) >> 1, (size & ~thrice) >> 1
    for place in reversed(range(places(top, recoding))):
        digit = ((plus >> place & 1) - (minus >> place & 1)).to(torch.int8)
        yield torch.where(negative, -digit, digit), place


def digits_that_fire(top: int, recoding: Recoding) -> Tensor:
    """How many digits of ``0 … top`` differ from 0, int64 ``(top + 1,)``."""
    found = torch.zeros(top + 1, dtype=torch.int64)
    for digit, _ in iterate_digits(torch.arange(top + 1), top, recoding):
        found += digit.abs()
    return found


def edges(place: int, recoding: Recoding) -> tuple[int, int | None]:
    """Whole thresholds from which on a neuron fires at the moment of 2^k, and below which it fires
    a negative spike; None where it never does.

    With signed digits smaller powers reach ``floor(2^(k + 1) / 3)`` in both directions.
    """
    if recoding == "binary":
        return 1 << place, None
    reach = (2 << place) // 3
    return reach + 1, -reach
