"""Small pictures of few colours as PNG, in an address that holds them."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def png_address(pixels: Tensor, colors: Sequence[str]) -> str:
    """A picture as a ``data:`` address.

    Args:
        pixels: uint8 ``(rows, columns)``: 0 for nothing, k for the k-th colour.
        colors: ``#rrggbb``.
    """
    rows, columns = pixels.shape
    filtered = torch.cat((torch.zeros(rows, 1, dtype=torch.uint8), pixels.cpu()), 1)
    palette = b"\0\0\0" + b"".join(bytes.fromhex(color.removeprefix("#")) for color in colors)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(filtered.contiguous().numpy().tobytes(), 6)),
        (b"IEND", b""),
    )
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)
    return f"data:image/png;base64,{base64.b64encode(whole).decode()}"


def _chunk(name: bytes, data: bytes) -> bytes:
    size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(name + data))
    return size + name + data + check
