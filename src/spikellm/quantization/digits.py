"""Digits of any base packed into bytes: ternary digits take 1.6 bits, those of base 5 about 2.33.

As many digits as fit stand for one number of one to seven bytes, least significant first. The base
decides how many bytes: those that waste least. What is left at the end of a row takes the bytes
that it needs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_MOST_BYTES = 7  # of a number, which then fits into int64


def digits_length(length: int, base: int) -> int:
    """Bytes that ``length`` digits take."""
    digits, size = _word(base)
    whole, rest = divmod(length, digits)
    return whole * size + _bytes_of(rest, base)


def pack_digits(digits: Tensor, base: int) -> Tensor:
    """Pack digits into bytes.

    Args:
        digits: integers from 0 to ``base − 1``, ``(..., length)``.
        base: 2 to 511.

    Returns:
        uint8, ``(..., digits_length(length, base))``.

    Raises:
        ValueError: a digit is out of range.
    """
    if digits.numel() and not 0 <= int(digits.min()) <= int(digits.max()) < base:
        raise ValueError(
            f"digits from {int(digits.min())} to {int(digits.max())} are not of base {base}"
        )
    (count, size), length = _word(base), digits.shape[-1]
    if length == 0:
        return digits.to(torch.uint8)
    padded = torch.nn.functional.pad(digits, (0, -length % count)).unflatten(-1, (-1, count))
    numbers = padded[..., count - 1].long()
    for place in reversed(range(count - 1)):
        numbers = numbers * base + padded[..., place]
    parts = [(numbers >> (8 * place)) & 255 for place in range(size)]
    stream = torch.stack(parts, dim=-1).flatten(-2).to(torch.uint8)
    return stream[..., : digits_length(length, base)].contiguous()


def unpack_digits(packed: Tensor, base: int, length: int) -> Tensor:
    """Inverse of :func:`pack_digits`: uint8 (int16 from base 257 on), ``(..., length)``."""
    count = _word(base)[0]
    dtype = torch.uint8 if base <= 256 else torch.int16
    if length == 0:
        return packed.new_zeros((*packed.shape[:-1], 0), dtype=dtype)
    numbers, digits = _numbers(packed, base), []
    for _ in range(count):
        digits.append((numbers % base).to(dtype))
        numbers = numbers // base
    return torch.stack(digits, dim=-1).flatten(-2)[..., :length]


def are_digits(packed: Tensor, base: int, length: int) -> bool:
    """Whether bytes are what :func:`pack_digits` gives of ``length`` digits."""
    if length == 0 or packed.numel() == 0:
        return True
    count = _word(base)[0]
    numbers, last = _numbers(packed, base).long(), (length - 1) % count + 1
    return bool((numbers < base**count).all()) and bool((numbers[..., -1] < base**last).all())


@cache
def _word(base: int) -> tuple[int, int]:
    """Digits of a number, and its bytes."""
    best = (0, 1)
    for size in range(1, _MOST_BYTES + 1):
        digits = 0
        while base ** (digits + 1) <= 256**size:
            digits += 1
        if digits * best[1] > best[0] * size:
            best = (digits, size)
    return best


def _bytes_of(digits: int, base: int) -> int:
    """Bytes of the largest number of so many digits."""
    largest: int = base**digits - 1
    return (largest.bit_length() + 7) // 8


def _numbers(packed: Tensor, base: int) -> Tensor:
    """The numbers that bytes stand for, int64, or uint8 where each is a byte."""
    size = _word(base)[1]
    if size == 1:
        return packed
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % size))
    parts = padded.unflatten(-1, (-1, size)).unbind(-1)
    numbers = torch.zeros_like(parts[0], dtype=torch.int64)
    for part in reversed(parts):
        numbers = (numbers << 8) | part
    return numbers
