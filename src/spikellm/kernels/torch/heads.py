"""Spike codes of attention heads in torch: one threshold and baseline for each token, head and
range, steps by channel of the head.

All channels of a range share one coarse pair (θ, z) found for T = 1; a channel with T steps uses
θ/T and T·z. So two numbers a token and range say everything, and a cache row is the packed codes
followed by them: θ as bfloat16 (rounded up, so that the top code still reaches the end of the
range) and z as one byte.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.kernels.spec import HeadSpec
from spikellm.quantization.packing import pack, packed_length, unpack
from spikellm.quantization.rounding import half_up
from spikellm.quantization.thresholds import coded_range, part_of_range, threshold_for_range


class HeadCodes(NamedTuple):
    """Codes int32 ``(batch, heads, tokens, channels)``.

    Θ float32 and z float32 ``(batch, heads, tokens, ranges)`` for T = 1. Where some tokens are
    massive, which, bool ``(batch, heads, tokens)``; their θ and z are those of their own steps.
    """

    codes: Tensor
    theta: Tensor
    baseline: Tensor
    massive: Tensor | None = None


class TorchHeads:
    """A coder of heads in torch; unlike other backends it also gives the codes themselves."""

    most_queries = 0

    def __init__(self, spec: HeadSpec) -> None:
        self.spec = spec
        self._steps = spec.channel_steps.unsqueeze(1)  # (heads, 1, channels)
        self._fineness = self._steps / spec.steps
        of = spec.range_of.unsqueeze(1)
        self._members = [(of == index).float() for index in range(spec.ranges)]

    def encode(self, x: Tensor) -> HeadCodes:
        """Codes of ``(batch, heads, tokens, channels)``."""
        x = x.float()
        theta, baseline = self._thresholds(x)
        found = self.spec.neuron.encode(x, *self._by_channel(theta, baseline), self._steps)
        return HeadCodes(found, theta, baseline)

    def decode(self, coded: HeadCodes) -> Tensor:
        """Values that codes stand for, float32."""
        return self.spec.neuron.decode(coded.codes, *self._by_channel(coded.theta, coded.baseline))

    def baselines(self, coded: HeadCodes) -> Tensor:
        """T·z of every channel, float32; broadcasts to the codes."""
        return self._by_channel(coded.theta, coded.baseline)[1]

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``decode(encode(x))`` in fewer passes."""
        x = x.float()
        return self.spec.neuron.fake_quantize(
            x, *self._by_channel(*self._thresholds(x)), self._steps
        )

    def range_ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the whole range of every value (or mean magnitudes, with both signs), which
        broadcast to ``x``, float32.
        """
        spec, lows, highs = self.spec, [], []
        for index in range(spec.ranges):
            part = x * self._members[index] if spec.ranges > 1 else x
            low, high = self._range(part, index, 1.0)
            if spec.thresholds != "asymmetric":
                high = torch.maximum(high, -low)
                low = -high
            lows.append(low)
            highs.append(high)
        if spec.ranges == 1:
            return lows[0], highs[0]
        first, second = self._members
        return lows[0] * first + lows[1] * second, highs[0] * first + highs[1] * second

    def _range(self, x: Tensor, index: int, share: float) -> tuple[Tensor, Tensor]:
        """What is coded of one range, others' channels set to zero."""
        spec = self.spec
        if spec.axis != "token":
            return part_of_range(*_range_over_tokens(x), share)
        among = None
        if spec.ranges > 1:
            among = self._members[index].sum(-1, keepdim=True).clamp(min=1)
        return coded_range(x, share, spec.threshold_source, among)

    def to_rows(self, x: Tensor) -> Tensor:
        """``pack(encode(x))``."""
        return self.pack(self.encode(x))

    def key_scores(self, query: Tensor, rows: Tensor) -> Tensor:
        """Not taken from packed rows here: decode them."""
        raise RequestError("torch takes no products with packed rows; decode them first")

    def value_sums(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Not taken from packed rows here: decode them."""
        raise RequestError("torch takes no products with packed rows; decode them first")

    def pack(self, coded: HeadCodes) -> Tensor:
        """One row of bytes a token and head: uint8 ``(batch, heads, tokens, row_bytes)``."""
        codes = coded.codes + self._shift
        ordered = codes.gather(-1, self.spec.order[None, :, None].expand_as(codes))
        lengths = self.spec.lengths(ordered.shape[-1])
        sections = [
            pack(part, bits)
            for part, bits in zip(ordered.split(lengths, dim=-1), self.spec.bits, strict=True)
        ]
        theta = coded.theta.to(torch.bfloat16).contiguous()
        theta = theta.masked_fill(theta.isnan(), torch.nan).view(torch.uint8)  # one NaN of the many
        return torch.cat([*sections, theta, coded.baseline.to(torch.uint8)], dim=-1)

    def unpack(self, rows: Tensor, channels: int) -> HeadCodes:
        """Inverse of :meth:`pack`."""
        spec, lengths = self.spec, self.spec.lengths(channels)
        sizes = [packed_length(n, bits) for n, bits in zip(lengths, spec.bits, strict=True)]
        *sections, theta, baseline = rows.split([*sizes, 2 * spec.ranges, spec.ranges], dim=-1)
        parts = [
            unpack(part, bits, length).to(torch.int32)
            for part, bits, length in zip(sections, spec.bits, lengths, strict=True)
        ]
        ordered = torch.cat(parts, dim=-1)
        codes = torch.empty_like(ordered).scatter_(
            -1, spec.order[None, :, None].expand_as(ordered), ordered
        )
        # A copy, since a single row passes for contiguous whatever its stride.
        theta = theta.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        return HeadCodes(codes - self._shift, theta.float(), baseline.float())

    def _thresholds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """θ and z for T = 1: a pair for each token and range, or for each channel where ranges run
        over the sequence.
        """
        spec, signed = self.spec, self.spec.neuron.signed
        thetas, baselines = [], []
        for index in range(spec.ranges):
            # a range includes zero anyway
            part = x * self._members[index] if spec.ranges > 1 else x
            low, high = self._range(part, index, spec.share)
            theta, baseline = threshold_for_range(
                low, high, spec.top, symmetric=spec.symmetric, signed=signed
            )
            theta = _round_up(theta)
            if not (spec.symmetric or signed):
                baseline = half_up(-low / theta).nan_to_num(0.0).clamp(0, spec.top)
            thetas.append(theta)
            baselines.append(baseline)
        if spec.axis == "sequence":
            return thetas[0], baselines[0]
        return torch.cat(thetas, -1), torch.cat(baselines, -1)

    @property
    def _shift(self) -> Tensor | int:
        neuron = self.spec.neuron
        return neuron.levels * self._steps if neuron.signed else 0

    def _by_channel(self, theta: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        """θ/T and T·z of every channel."""
        if self.spec.ranges > 1:
            theta, baseline = (
                pair[..., :1] * self._members[0] + pair[..., 1:] * self._members[1]
                for pair in (theta, baseline)
            )
        if self.spec.salient_steps == self.spec.steps:
            return theta, baseline
        return theta / self._fineness, baseline * self._fineness


def _range_over_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(-2, keepdim=True).clamp(max=0), x.amax(-2, keepdim=True).clamp(min=0)


def _round_up(theta: Tensor) -> Tensor:
    """Smallest bfloat16 that is not below a positive float32; NaN stays NaN."""
    near = theta.to(torch.bfloat16)
    bits = near.view(torch.int16)
    higher = (bits + 1).view(torch.bfloat16)
    return torch.where(near.float() < theta, higher, near).float()
