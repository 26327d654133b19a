"""Integer codes of 1 to 8 bits, packed along the last axis without gaps, least significant bit first."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_length(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits take."""
    return (length * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, ``(..., length)``, each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint8, ``(..., packed_length(length, bits))``; unused high bits of the last byte are 0.

    Raises:
        ValueError: a code does not fit into ``bits``.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes to pack must be uint8, not {codes.dtype}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes.contiguous()
    length = codes.shape[-1]
    if 8 % bits == 0:
        share = 8 // bits
        padded = torch.nn.functional.pad(codes, (0, -length % share)).unflatten(-1, (-1, share))
        packed: Tensor = padded[..., 0].clone()
        for place in range(1, share):
            packed |= padded[..., place] << (place * bits)
        return packed
    stream = _bits_of(codes, bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    return _numbers_from(stream, 8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 codes ``(..., length)``."""
    if bits == 8:
        return packed[..., :length]
    if 8 % bits == 0:
        mask = 2**bits - 1
        parts = [(packed >> place) & mask for place in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :length]
    return _numbers_from(_bits_of(packed, 8)[..., : length * bits], bits)


def _bits_of(numbers: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits, dtype=torch.uint8, device=numbers.device)
    return ((numbers.unsqueeze(-1) >> places) & 1).flatten(-2)


def _numbers_from(stream: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits, dtype=torch.uint8, device=stream.device)
    numbers: Tensor = stream.unflatten(-1, (stream.shape[-1] // bits, bits)) << places
    return numbers.sum(-1, dtype=torch.uint8)
