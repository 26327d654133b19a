"""Types of matrices in GGUF files, and matrices in them. The ``gguf`` package quantizes, so that
blocks are those that llama.cpp reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.core.extras import require
from spikellm.core.registry import unknown_name

if TYPE_CHECKING:
    import numpy as np

TYPES = ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0")
"""Types that the package can quantize to."""
_SMALLER_BLOCKS = {"tq1_0": "q4_0", "tq2_0": "q4_0"}
_ROWS = 4096  # quantized at once; bounds the memory that this takes in float32


class FileTypes(NamedTuple):
    """Types of a file: of the linear layers of the blocks, and of embedding and output
    projection.
    """

    layers: str
    vocabulary: str

    def __str__(self) -> str:
        if self.layers == self.vocabulary:
            return self.layers
        return f"{self.layers}, vocabulary {self.vocabulary}"


def require_gguf() -> Any:
    """The ``gguf`` package.

    Raises:
        DependencyError: it is not installed.
    """
    return require("GGUF files", "gguf", "gguf")


def require_types(types: FileTypes) -> None:
    """Raise if one of the types is not known.

    Raises:
        RequestError: names those that are.
    """
    for name in types:
        if name not in TYPES:
            raise RequestError(unknown_name("GGUF type", name, TYPES))


def fitting_type(wanted: str, columns: int) -> str:
    """The type of a matrix of this many columns: ``wanted`` where its blocks divide a row, else
    what llama.cpp's quantizer falls back to (``tensor_type_fallback``): 4 bits in place of ternary
    codes, which come in blocks of 256, and 16 bits where blocks of 32 do not divide a row either.
    """
    for name in (wanted, _SMALLER_BLOCKS.get(wanted, wanted)):
        if columns % block_of(name)[0] == 0:
            return name
    return "f16"


def block_of(name: str) -> tuple[int, int]:
    """Values and bytes of a block of a type."""
    gguf = require_gguf()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    return int(values), int(size)


def stored_bytes(name: str, shape: torch.Size) -> int:
    """Bytes of a tensor of a type that fits it."""
    values, size = block_of(name)
    return shape.numel() // values * size


def quantized(values: Tensor, name: str) -> np.ndarray[Any, Any]:
    """A tensor in blocks of a type that fits it, as the package lays them out."""
    import numpy as np

    gguf = require_gguf()
    kind = gguf.GGMLQuantizationType[name.upper()]
    rows = [gguf.quants.quantize(part.float().numpy(), kind) for part in values.split(_ROWS)]
    return np.concatenate(rows)
