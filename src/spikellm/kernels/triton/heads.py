"""Coders of attention heads ready for the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.native.linear_plan import MODES
from spikellm.kernels.spec import HeadSpec
from spikellm.kernels.torch.heads import HeadCodes, TorchHeads
from spikellm.kernels.triton.jit.heads import code_heads
from spikellm.kernels.triton.jit.rows import key_scores, value_sums
from spikellm.kernels.triton.launch import current
from spikellm.quantization.packing import packed_length

_LONG = 256  # channels from which a program has more warps
_TOKENS = 32  # that are unpacked at a time
_PART = 512  # tokens of a program that sums values
_LEAST = 16  # rows of a tile that tensor cores take


class TritonHeads(TorchHeads):
    """Codes in one pass, into values or into rows of a cache; products with rows, which are never
    unpacked as a whole.
    """

    most_queries = 16

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self._ranges = spec.range_of.int().contiguous()
        self._tops = (spec.channel_steps * spec.neuron.levels).int().contiguous()
        self._fine = (spec.channel_steps / spec.steps).float().contiguous()
        self._block = max(_LEAST, 1 << (spec.channels - 1).bit_length())
        self._order, self._places = self._stored()

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Channel of every place of a row, and what ``values_of_rows`` needs to know of it."""
        spec = self.spec
        held, places = 0, []
        for count, bits in zip(spec.lengths(spec.channels), spec.bits, strict=True):
            places += [(8 * held + index * bits, bits) for index in range(count)]
            held += packed_length(count, bits)
        self._codes_bytes = held
        order = spec.order
        whole = torch.zeros(len(order), 4, self._block, dtype=torch.int32, device=order.device)
        where = torch.tensor(places, dtype=torch.int32, device=order.device).T
        whole[:, :2, : spec.channels] = where
        whole[:, 2, : spec.channels] = self._ranges.expand_as(order).gather(1, order)
        fine = self._fine.expand(order.shape).gather(1, order).contiguous()
        whole[:, 3, : spec.channels] = fine.view(torch.int32)
        padded = torch.zeros(len(order), self._block, dtype=torch.int32, device=order.device)
        padded[:, : spec.channels] = order
        return padded, whole

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :class:`spikellm.kernels.prepared.PreparedHeads`, as for the method below."""
        values = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._run(x, values, None)
        return values

    def to_rows(self, x: Tensor) -> Tensor:
        codes = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
        theta, baseline = self._run(x, None, codes)
        return self.pack(HeadCodes(codes.to(torch.int32) - self._shift, theta, baseline))

    def key_scores(self, query: Tensor, rows: Tensor) -> Tensor:
        query, rows = query.float().contiguous(), rows.contiguous()
        tokens = rows.shape[2]
        scores = query.new_empty(*query.shape[:3], tokens)
        if scores.numel():
            with current(query):
                key_scores[len(rows) * rows.shape[1], -(-tokens // _TOKENS)](
                    *(query, rows, self._order, self._places, scores),
                    *self._sizes(query, rows),
                    **self._constants(query, rows),
                )
        return scores

    def value_sums(self, weights: Tensor, rows: Tensor) -> Tensor:
        weights, rows = weights.float().contiguous(), rows.contiguous()
        parts = -(-rows.shape[2] // _PART)
        sums = weights.new_empty(parts, *weights.shape[:3], self.spec.channels)
        if weights.numel():
            with current(weights):
                value_sums[len(rows) * rows.shape[1], parts](
                    *(weights, rows, self._order, self._places, sums),
                    *self._sizes(weights, rows),
                    _PART,
                    **self._constants(weights, rows),
                )
        return sums[0] if parts == 1 else sums.sum(0)

    def _sizes(self, x: Tensor, rows: Tensor) -> tuple[int | float, ...]:
        _, heads, queries, _ = x.shape
        shapes = heads, rows.shape[1], queries, rows.shape[2], self.spec.channels
        return (*shapes, len(self._order), rows.shape[3], self._codes_bytes, float(self.spec.top))

    def _constants(self, x: Tensor, rows: Tensor) -> dict[str, int | bool]:
        asks = x.shape[1] // rows.shape[1] * x.shape[2]
        return {
            "RANGES": self.spec.ranges,
            "SIGNED": self.spec.thresholds == "signed",
            "BLOCK_QUERIES": max(_LEAST, 1 << (asks - 1).bit_length()),
            "BLOCK_TOKENS": _TOKENS,
            "BLOCK": self._block,
            "num_warps": 4,
            "enable_fp_fusion": False,
        }

    def _run(self, x: Tensor, values: Tensor | None, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Write values or codes; θ and z of every range."""
        spec, x = self.spec, x.float().contiguous()
        batch, heads, tokens, channels = x.shape
        theta = x.new_empty(batch, heads, tokens, spec.ranges)
        baseline = torch.empty_like(theta)
        rows = batch * heads * tokens
        if rows:
            with current(x):
                code_heads[(rows,)](
                    *(x, self._ranges, self._tops, self._fine, values, codes, theta, baseline),
                    *(heads, tokens, channels, len(spec.order), float(spec.share)),
                    float(spec.top),
                    RANGES=spec.ranges,
                    MODE=MODES[spec.thresholds],
                    VALUES=values is not None,
                    BLOCK=self._block,
                    num_warps=4 if channels >= _LONG else 1,
                    enable_fp_fusion=False,
                )
        return theta, baseline
