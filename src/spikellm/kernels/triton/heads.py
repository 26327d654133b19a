"""Coders of attention heads ready for the Triton kernel; packed rows are decoded by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.kernels.spec import HeadSpec
from spikellm.kernels.torch.heads import HeadCodes, TorchHeads
from spikellm.kernels.triton.jit.heads import code_heads
from spikellm.kernels.triton.launch import MODES, current

_LONG = 256  # channels from which a program has more warps


class TritonHeads(TorchHeads):
    """Codes in one pass, into values or into rows of a cache."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self._ranges = spec.range_of.int().contiguous()
        self._tops = (spec.channel_steps * spec.neuron.levels).int().contiguous()
        self._fine = (spec.channel_steps / spec.steps).float().contiguous()

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :class:`spikellm.kernels.prepared.PreparedHeads`, as for the method below."""
        values = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._run(x, values, None)
        return values

    def to_rows(self, x: Tensor) -> Tensor:
        codes = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
        theta, baseline = self._run(x, None, codes)
        return self.pack(HeadCodes(codes.to(torch.int32) - self._shift, theta, baseline))

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
                    BLOCK=1 << (channels - 1).bit_length(),
                    num_warps=4 if channels >= _LONG else 1,
                    enable_fp_fusion=False,
                )
        return theta, baseline
