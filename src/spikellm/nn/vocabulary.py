"""Input embedding and output projection whose weights are integer codes.

    row v of the table:  w[v, c] = s[v, group of c] · (code[v, c] − 2^(bits − 1))

The embedding decodes the rows that are looked up, the projection takes sums over all rows of inputs
that are not coded. Both may have one :class:`CodedTable`, which then belongs to the embedding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spikellm.core.offload import offload
from spikellm.kernels import LinearSpec, RowSpec, Segment, select
from spikellm.kernels.base import REFERENCE, backends
from spikellm.kernels.prepared import PackedCodes, PreparedLinear, PreparedRows
from spikellm.nn.prepared import PreparedModule
from spikellm.quantization.affine import AffineWeights, column_groups
from spikellm.quantization.packing import pack, packed_length, unpack
from spikellm.quantization.ste import through_weight
from spikellm.recipe import VocabularyRecipe


class CodedTable(PreparedModule):
    """Rows of integer codes, packed.

    Buffers: ``weight_codes`` (uint8, ``(rows, bytes)``) and ``weight_scale`` (float32,
    ``(rows, groups)``).

    Args:
        device: of the buffers.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    prepared: ClassVar[tuple[str, ...]] = ("_product", "_rows")
    _product: PreparedLinear | None
    _rows: PreparedRows | None
    bias = None  # kernels ask for one

    def __init__(
        self, rows: int, columns: int, settings: VocabularyRecipe, device: Any = None
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.settings = rows, columns, settings
        self.groups = column_groups(columns, settings.group_size)
        codes = torch.zeros(
            rows, packed_length(columns, settings.bits), dtype=torch.uint8, device=device
        )
        self.register_buffer("weight_codes", codes)
        scale = torch.ones(rows, len(self.groups), dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)

    @classmethod
    def like(cls, weight: Tensor, settings: VocabularyRecipe) -> CodedTable:
        """An empty one of the shape and on the device of a matrix."""
        return cls(weight.shape[0], weight.shape[1], settings, weight.device)

    @torch.no_grad()
    def set_weights(self, weights: AffineWeights, first: int = 0) -> None:
        """Take over codes whose zero-points are in the middle, of rows from the ``first`` on."""
        rows = slice(first, first + len(weights.codes))
        self.weight_codes[rows] = pack(weights.codes, self.settings.bits)
        self.weight_scale[rows] = weights.scale
        self.forget()

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def spec(self) -> LinearSpec:
        """The layer as kernels see it whose weights these are."""
        bits, count, whole = self.settings.bits, len(self.groups), (0, self.columns)
        segments = (Segment(*group, 0, index) for index, group in enumerate(self.groups))
        return LinearSpec(
            columns=self.columns,
            rows=self.rows,
            weights="affine",
            weight_bits=bits,
            scales=count,
            weight_steps=(1,) * count,
            weight_tops=(2**bits - 1,) * count,
            neuron=None,
            symmetric=False,
            steps=(1,),
            bounds=(whole,),
            ranges=(whole,),
            segments=tuple(segments),
            order=None,
            execution="merged",
        )

    def packed_codes(self) -> PackedCodes:
        """Codes, and the zero-point in the middle for each group."""
        middle = torch.full_like(
            self.weight_scale, 2 ** (self.settings.bits - 1), dtype=torch.uint8
        )
        return PackedCodes(self.weight_codes, middle)

    def integer_weights(self, rows: slice = slice(None)) -> Tensor:
        """Integers of some rows, int16 ``(rows, columns)``."""
        codes = unpack(self.weight_codes[rows], self.settings.bits, self.columns)
        return codes.to(torch.int16).sub_(2 ** (self.settings.bits - 1))

    def planes(self) -> list[CodedTable]:
        """The table itself."""
        return [self]

    def dense_weight(self) -> Tensor:
        """What the codes stand for, float32 ``(rows, columns)``."""
        weight = self.integer_weights().float()
        for group, (start, stop) in enumerate(self.groups):
            weight[:, start:stop] *= self.weight_scale[:, group : group + 1]
        return weight

    def release_codes(self) -> None:
        """Say that codes are not needed for a while; what is read from a file leaves memory."""
        offload(self.weight_codes)

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by their numbers ``(...)``: ``(..., columns)``.

        Raises:
            IndexError: there is no such row.
        """
        self.forget_if_written()
        if torch.compiler.is_compiling():
            return backends[REFERENCE].prepare_rows(RowSpec(self.spec()), self)(rows, dtype)
        if self._rows is None:
            spec = RowSpec(self.spec())
            self._rows = select(spec, self.weight_codes.device).prepare_rows(spec, self)
        return self._rows(rows, dtype)

    def product(self, x: Tensor) -> Tensor:
        """Sums of inputs ``(..., columns)`` over every row: ``(..., rows)``, in their type."""
        if torch.compiler.is_compiling():
            return backends[REFERENCE].prepare_linear(self.spec(), self)(x)
        return self.kernel()(x)

    def kernel(self) -> PreparedLinear:
        """What takes these sums, prepared."""
        self.forget_if_written()
        if self._product is None:
            spec = self.spec()
            self._product = select(spec, self.weight_codes.device).prepare_linear(spec, self)
        return self._product


class CodedEmbedding(nn.Module):
    """An embedding of coded rows.

    Args:
        multiplier: that the model's own embedding takes rows times, ``(1,)``, in the type of what
            it gives; a parameter, so that a model has one of its type in any case.
    """

    def __init__(self, table: CodedTable, multiplier: Tensor) -> None:
        super().__init__()
        self.table = table
        self.multiplier = nn.Parameter(multiplier, requires_grad=False)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.table.rows

    @property
    def embedding_dim(self) -> int:
        """Channels of a row."""
        return self.table.columns

    @property
    def weight(self) -> Tensor:
        """The table decoded, made anew each time."""
        return self.table.dense_weight().to(self.multiplier.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(...)`` → ``(..., channels)``."""
        return self.table.look_up(tokens, self.multiplier.dtype) * self.multiplier

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.table.settings.bits}-bit rows"


class CodedHead(nn.Module):
    """An output projection of coded weights, inputs not coded.

    Args:
        table: its weights.
        bias: ``(rows,)``, any float type; None if there is none.
        shared: the table is that of the embedding, which it stays part of.
    """

    table: CodedTable

    def __init__(self, table: CodedTable, bias: nn.Parameter | None, *, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        if shared:
            self.__dict__["table"] = table  # no submodule, so that it is stored once
        else:
            self.table = table
        self.bias = bias

    @property
    def in_features(self) -> int:
        """Channels of the inputs."""
        return self.table.columns

    @property
    def out_features(self) -> int:
        """Rows of the table."""
        return self.table.rows

    @property
    def weight(self) -> Tensor:
        """The table decoded, made anew each time."""
        return self.table.dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., channels)`` → ``(..., rows)``, in the type of ``x``; gradients pass as through
        the weight that the codes stand for.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return through_weight(x, self._output(x.detach()), self.table.dense_weight)
        return self._output(x)

    def _output(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.table.product(x)
        return (self.table.product(x.float()) + self.bias.float()).to(x.dtype)

    def extra_repr(self) -> str:
        bits, shared = self.table.settings.bits, ", table of the embedding" if self.shared else ""
        return (
            f"in={self.in_features}, out={self.out_features}, weights {bits}-bit, inputs not"
            f" coded{shared}, bias={self.bias is not None}"
        )
