"""Integer codes of 1 to 16 bits, packed along the last axis without gaps, least significant bit
first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_length(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits take."""
    return (length * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: integers, ``(..., length)``, each from 0 to ``2**bits - 1``.
        bits: 1 to 16.

    Returns:
        uint8, ``(..., packed_length(length, bits))``; unused high bits of the last byte are 0.

    Raises:
        ValueError: a code does not fit into ``bits``.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes to pack must be integers, not {codes.dtype}")
    if codes.numel() and (int(codes.max()) >= 2**bits or int(codes.min()) < 0):
        raise ValueError(
            f"codes from {int(codes.min())} to {int(codes.max())} do not fit into {bits} bits"
        )
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    length = codes.shape[-1]
    if 8 % bits == 0:
        share = 8 // bits
        padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -length % share)).unflatten(
            -1, (-1, share)
        )
        packed: Tensor = padded[..., 0].clone()
        for place in range(1, share):
            packed |= padded[..., place] << (place * bits)
        return packed
    stream = _bits_of(codes, bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    return _numbers_from(stream, 8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of :func:`pack`: codes ``(..., length)``, uint8 up to 8 bits, int32 above."""
    if bits == 8:
        return packed[..., :length]
    if 8 % bits == 0:
        mask = 2**bits - 1
        parts = [(packed >> place) & mask for place in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :length]
    return _numbers_from(_bits_of(packed, 8)[..., : length * bits], bits)


def _bits_of(numbers: Tensor, bits: int) -> Tensor:
    wide = numbers if bits <= 8 and numbers.dtype == torch.uint8 else numbers.to(torch.int32)
    return (
        ((wide.unsqueeze(-1) >> torch.arange(bits, dtype=wide.dtype, device=wide.device)) & 1)
        .to(torch.uint8)
        .flatten(-2)
    )


def _numbers_from(stream: Tensor, bits: int) -> Tensor:
    dtype = torch.uint8 if bits <= 8 else torch.int32
    places = torch.arange(bits, dtype=dtype, device=stream.device)
    numbers: Tensor = stream.unflatten(-1, (stream.shape[-1] // bits, bits)).to(dtype) << places
    return numbers.sum(-1, dtype=dtype)
