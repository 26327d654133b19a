"""Numbers that are sums of a few signed powers of two, by which a product is made of shifts and
additions (ShiftAddLLM; You et al., NeurIPS 2024).

All of them have a significand of 8 bits, so that bfloat16 holds them exactly: 1.75 = 2 − 2^−2 has
two terms, 1.625 = 2 − 2^−1 + 2^−3 three. A significand of 8 bits never takes more than four.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_BITS = 8  # of a significand
MOST_TERMS = 3
"""Of a scale; four would allow every number."""


def digits_of(number: int) -> list[int]:
    """Signed binary digits −1, 0, 1 of a positive integer, the lowest first, as few of them as
    possible other than 0 (the non-adjacent form).
    """
    digits = []
    while number:
        digit = 2 - (number & 3) if number & 1 else 0
        digits.append(digit)
        number = (number - digit) >> 1
    return digits


@cache
def _allowed(terms: int) -> tuple[int, ...]:
    """Significands of 8 bits, and the next power of two, of at most so many terms."""
    low = 1 << (_BITS - 1)
    return tuple(
        number for number in range(low, 2 * low + 1) if sum(map(abs, digits_of(number))) <= terms
    )


def nearest_sum_of_powers(value: Tensor, terms: int) -> Tensor:
    """The nearest number that is a sum of at most ``terms`` signed powers of two.

    Args:
        value: positive, float32, any shape; at least 2^−100.
        terms: 1 to 4.
    """
    mantissa, exponent = torch.frexp(value.float())
    numbers = torch.tensor(_allowed(terms), dtype=torch.float32, device=value.device)
    middles = (numbers[1:] + numbers[:-1]) / 2
    chosen = numbers[torch.bucketize((mantissa * 2**_BITS).contiguous(), middles)]
    return torch.ldexp(chosen, exponent - _BITS)


def terms_of(value: Tensor) -> Tensor:
    """How many signed powers of two each number takes, int64; those of more than 8 significant
    bits count as 8.

    Args:
        value: positive, any float type and shape.
    """
    mantissa, _ = torch.frexp(value.double())
    significand = mantissa * 2**_BITS
    counts = torch.tensor([sum(map(abs, digits_of(n))) for n in range((1 << _BITS) + 1)])
    whole = significand.round()
    return torch.where(whole == significand, counts.to(value.device)[whole.long()], _BITS)


def shifted(x: Tensor, exponent: Tensor) -> Tensor:
    """``x · 2^exponent`` without a product: the exponents of floating-point numbers are added up.

    Args:
        x: float64, finite, and so is what comes out.
        exponent: int64, broadcast to ``x``.
    """
    moved = (x.view(torch.int64) + (exponent << 52)).view(torch.float64)
    return torch.where(x == 0, x, moved)


class ShiftedScales:
    """Multiplies by scales that are sums of powers of two, by shifts and additions alone.

    Args:
        scale: positive, of any float type and shape, each a sum of at most four signed powers of
            two.
    """

    def __init__(self, scale: Tensor) -> None:
        stored = scale.double().view(torch.int64)
        exponent = (stored >> 52) - 1023 - (_BITS - 1)
        number = ((stored >> (53 - _BITS)) & ((1 << (_BITS - 1)) - 1)) | (1 << (_BITS - 1))
        self._terms: list[tuple[Tensor, Tensor]] = []  # signs, and what to shift by
        for place in range(_BITS + 1):
            odd = number & 1
            digit = torch.where(odd == 1, 2 - (number & 3), 0)
            number = (number - digit) >> 1
            if bool(digit.any()):
                self._terms.append((digit, exponent + place))

    def __call__(self, x: Tensor) -> Tensor:
        """``x · scale``, rounded once, float32: the bits of the product.

        Args:
            x: float32, broadcast to the scales; NaN and infinity stay.
        """
        wide, total = x.double(), torch.zeros((), dtype=torch.float64, device=x.device)
        for digit, exponent in self._terms:
            term = shifted(wide, exponent)
            total = total + torch.where(digit > 0, term, torch.where(digit < 0, -term, 0.0))
        return torch.where(x - x == 0, total.float(), x)
