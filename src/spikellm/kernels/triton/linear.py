"""Linear layers ready for the Triton kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.native.linear_plan import MODES
from spikellm.kernels.placing import Placing, fields_of, place_columns
from spikellm.kernels.prepared import LinearWeights, Observed, raised_by, shown_codes
from spikellm.kernels.spec import LinearSpec
from spikellm.kernels.triton.jit.coding import code_inputs
from spikellm.kernels.triton.jit.products import spike_product, weight_product
from spikellm.kernels.triton.launch import current
from spikellm.kernels.triton.presence import interpreting
from spikellm.quantization.packing import unpack

_SIGNED_BYTE, _LIFT = 127, 128
_CHUNK = 1 << 22  # weights that are unpacked at a time
_MOST_CODED = 1024  # columns that a program codes at a time
_ADDITIVE_TOKENS = 4  # for more, a product of matrices is faster


class _Tile(NamedTuple):
    """What one program works out, and with how many warps."""

    tokens: int
    rows: int
    warps: int


_TILES = (  # for up to so many tokens
    (16, _Tile(16, 32, 4)),
    (64, _Tile(64, 64, 4)),
    (math.inf, _Tile(128, 128, 8)),
)
_WIDE = _Tile(64, 64, 4)  # the largest for float32 inputs, of which more fill shared memory
# of inputs as kernels take them; the interpreter takes bfloat16 for integers
_TYPES = (torch.float32, *(() if interpreting() else (torch.float16, torch.bfloat16)))


def _tile_for(tokens: int) -> _Tile:
    return next(tile for most, tile in _TILES if tokens <= most)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


class _Weights:
    """Packed codes and tables of a layer, on its device; codes stay as they are stored."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        self.spec, self.placing = spec, place_columns(spec)
        codes, zero = weights.packed_codes()
        self.device, self.codes, self.zero = codes.device, codes.contiguous(), zero.contiguous()
        self.scale = weights.weight_scale.float().contiguous()
        bias = weights.bias
        self.bias = None if bias is None else bias.detach().float().contiguous()
        table = [
            (
                *(part.activation_group, part.weight_group, part.offset, part.first_block),
                *(part.blocks * self.placing.block, part.first_block + part.blocks),
            )
            for part in self.placing.segments
        ]
        self.segments = self._integers(table)
        order = torch.arange(spec.columns) if spec.order is None else spec.order.cpu()
        source = torch.full((self.placing.width,), -1, dtype=torch.int32)
        source[self.placing.place.long()] = order.int()
        self.order, self.source = order.int().to(self.device), source.to(self.device)

    def _integers(self, table: object) -> Tensor:
        return torch.tensor(table, dtype=torch.int32, device=self.device)

    def constants(self) -> dict[str, int | bool]:
        """What products are compiled for."""
        bits = self.spec.weight_bits
        return {"BITS": bits, "FIELDS": fields_of(bits), "HAS_BIAS": self.bias is not None}

    def tokens_of(self, x: Tensor) -> Tensor:
        """``(tokens, in)`` of a type that kernels take."""
        tokens = x.reshape(-1, self.spec.columns).contiguous()
        return tokens if tokens.dtype in _TYPES else tokens.float()

    def outputs_for(self, tokens: Tensor) -> Tensor:
        return tokens.new_empty(len(tokens), self.spec.rows)


class TritonLinear(_Weights):
    """Inputs coded in one pass, and one integer product for all steps."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        super().__init__(spec, weights)
        tops, signed = [*spec.tops, spec.massive_top], spec.thresholds == "signed"
        self._lift = _LIFT if max(tops) * (2 if signed else 1) > _SIGNED_BYTE else 0
        self._massive_beyond = math.inf if spec.massive is None else spec.massive.beyond
        parts = self.placing.segments
        owners = [part.activation_group for part in parts]
        self._groups = self._integers(
            [
                (top, *span, *_run_of(group, owners))
                for group, (top, span) in enumerate(zip(spec.tops, spec.ranges, strict=True))
            ]
        )
        shares = [spec.share(group) for group in range(len(spec.tops))]
        self._shares = torch.tensor(shares, dtype=torch.float32, device=self.device)
        longest = max(part.blocks for part in parts) * self.placing.block
        self._block = min(_MOST_CODED, 1 << (longest - 1).bit_length())
        self._column_sums, whole = _sums(spec, self.placing, self.codes, self.zero)
        self._lifted = whole * self._lift if self._lift else None
        self._place = self.placing.place.to(self.device).long()
        raised = raised_by(spec)
        self._raised = None if raised is None else raised.to(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def observed(self, x: Tensor) -> Observed:
        """See :class:`spikellm.kernels.prepared.PreparedLinear`."""
        y, counts, z = self._run(x)
        codes = (counts[:, self._place].to(torch.int32) + self._lift).to(torch.uint8)
        return Observed(y, *shown_codes(codes, z, self._raised, self.spec.bounds))

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, counts in their places, and baselines."""
        spec, tokens = self.spec, self.tokens_of(x)
        count, groups, segments = len(tokens), len(spec.tops), len(self.segments)
        counts = tokens.new_empty((count, self.placing.width), dtype=torch.int8)
        thetas = tokens.new_empty((count, groups), dtype=torch.float32)
        baselines = tokens.new_empty((count, groups), dtype=torch.int32)
        totals = tokens.new_empty((count, segments), dtype=torch.int32)
        y = self.outputs_for(tokens)
        if count:
            self._launch(tokens, counts, thetas, baselines, totals, y)
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.rows), counts, baselines

    def _launch(self, tokens: Tensor, counts: Tensor, *written: Tensor) -> None:
        spec, (thetas, baselines, totals, y) = self.spec, written
        count, groups, segments = len(tokens), len(spec.tops), len(self.segments)
        tile = _tile_for(count)
        with current(tokens):
            code_inputs[(count,)](
                *(tokens, self.order, self.source, self._groups, self._shares, self.segments),
                *(counts, thetas, baselines, totals),
                *(spec.columns, self.placing.width, groups, segments),
                *(self._massive_beyond, spec.massive_top, self._lift),
                HAS_MASSIVE=spec.massive_top > 0,
                MODE=MODES[spec.thresholds or "asymmetric"],
                BLOCK=self._block,
                enable_fp_fusion=False,
            )
            spike_product[_blocks(count, tile.tokens), _blocks(spec.rows, tile.rows)](
                *(counts, thetas, baselines, totals, self.codes, self.scale, self.zero),
                *(self._lifted, self._column_sums, self.bias, self.segments, y),
                *(count, spec.rows, self.placing.width, self.codes.shape[1]),
                *(groups, segments, spec.scales),
                **self.constants(),
                HAS_LIFT=self._lifted is not None,
                BLOCK_TOKENS=tile.tokens,
                BLOCK_ROWS=tile.rows,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )


class TritonWeightOnly(_Weights):
    """Weights on inputs that are not coded; ternary ones of few tokens by additions alone."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        super().__init__(spec, weights)
        self._additive = spec.weights == "ternary" and set(spec.weight_steps) == {1}

    def __call__(self, x: Tensor) -> Tensor:
        spec, tokens = self.spec, self.tokens_of(x)
        y, count = self.outputs_for(tokens), len(tokens)
        additive = self._additive and count <= _ADDITIVE_TOKENS
        tile = _tile_for(count)
        if additive:
            tile = tile._replace(tokens=1)
        elif tokens.dtype == torch.float32:
            tile = min(tile, _WIDE)
        if count:
            self._launch(tokens, y, tile, additive)
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.rows)

    def _launch(self, tokens: Tensor, y: Tensor, tile: _Tile, additive: bool) -> None:
        spec, count = self.spec, len(tokens)
        with current(tokens):
            weight_product[_blocks(count, tile.tokens), _blocks(spec.rows, tile.rows)](
                *(tokens, self.source, self.codes, self.scale, self.zero, self.bias),
                *(self.segments, y, count, spec.rows, spec.columns, self.codes.shape[1]),
                *(len(self.segments), spec.scales),
                **self.constants(),
                ADDITIVE=additive,
                BLOCK_TOKENS=tile.tokens,
                BLOCK_ROWS=tile.rows,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )

    def observed(self, x: Tensor) -> Observed:
        """See :class:`spikellm.kernels.prepared.PreparedLinear`."""
        return Observed(self(x))


def _run_of(group: int, owners: list[int]) -> tuple[int, int]:
    """First segment of an activation group, and the one behind its last."""
    found = [index for index, owner in enumerate(owners) if owner == group]
    return (found[0], found[-1] + 1) if found else (0, 0)


def _sums(spec: LinearSpec, placing: Placing, codes: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Of every segment, int32 ``(segments, out)``: ``Σ (code − zero)`` over its columns, and the
    sum of what the kernel multiplies over all columns of its blocks.
    """
    lower, parts = 128 if spec.weight_bits == 8 else 0, placing.segments
    sums = torch.zeros(2, len(parts), spec.rows, dtype=torch.int32, device=codes.device)
    step = max(1, _CHUNK // max(1, spec.columns))
    for start in range(0, spec.rows, step):
        rows = slice(start, start + step)
        own = unpack(codes[rows], spec.weight_bits, spec.columns).to(torch.int32)
        for index, part in enumerate(parts):
            taken = part.stop - part.start
            column = own[:, part.start : part.stop].sum(1, dtype=torch.int32)
            sums[0, index, rows] = column - taken * zero[rows, part.weight_group].to(torch.int32)
            first = part.first_block * placing.block
            covered = part.blocks * placing.block
            whole = own[:, first : first + covered].sum(1, dtype=torch.int32)
            sums[1, index, rows] = whole - lower * covered
    return sums[0], sums[1]
