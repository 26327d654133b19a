"""Spike codes of attention heads: one threshold and baseline for each token, head and range, steps
by channel of the head.

All channels of a range share one coarse pair (θ, z) found for T = 1; a channel with T steps uses
θ/T and T·z. So two numbers a token and range
say everything, and a cache row is the packed codes followed by them: θ as bfloat16 (rounded up, so
    that the top code still reaches the end
of the range) and z as one byte.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.native.head_plan import HeadCoding, head_coding_fits, make_head_plan
from spikellm.neurons import make_neuron
from spikellm.nn import fast_heads
from spikellm.quantization.packing import pack, packed_length, unpack
from spikellm.quantization.rounding import half_up
from spikellm.quantization.thresholds import threshold_for_range, token_range
from spikellm.recipe import ActivationRecipe

_HEADER_BYTES = 3  # θ in two bytes, z in one


class HeadCodes(NamedTuple):
    """Codes int32 ``(batch, heads, tokens, channels)``.

    Θ float32 and z float32 ``(batch, heads, tokens, ranges)`` for T = 1.
    """

    codes: Tensor
    theta: Tensor
    baseline: Tensor


class HeadCoder:
    """Codes one of Q, K, V.

    Args:
        settings: how it is coded.
        group: uint8 ``(heads, channels)``, group of every channel of every head (see
            ``ActivationRecipe.group_ranges``).
        axis: ``"token"``: ranges over the channels of one token; ``"sequence"``: over all tokens of
            one channel, as published for K, which lets a code depend on what follows.
    """

    def __init__(self, settings: ActivationRecipe, group: Tensor, axis: str = "token") -> None:
        self.settings, self.axis = settings, axis
        self.neuron = make_neuron(settings.neuron, settings.bits)
        index = group.long()
        device = group.device
        self.steps = torch.tensor(settings.group_steps, device=device)[index].unsqueeze(
            1
        )  # (heads, 1, channels)
        self._fineness = self.steps / settings.steps
        of = torch.tensor(settings.group_ranges, device=device)[index].unsqueeze(1)
        self._ranges = len(set(settings.group_ranges))
        self._of = of.squeeze(1)
        self._plan: tuple[int, Tensor | None] | None = None
        self._members = [
            (of == index).float() for index in range(self._ranges)
        ]  # 1 where a channel is in the range
        salient = self.steps.squeeze(1) > settings.steps
        self._order = torch.sort(
            salient.to(torch.uint8), dim=1, stable=True
        ).indices  # ordinary channels first
        self._ordinary = int((~salient[0]).sum()) if len(salient) else 0
        self._uniform = bool((salient.sum(1) == salient[:1].sum(1)).all()) if len(salient) else True

    def encode(self, x: Tensor) -> HeadCodes:
        """Codes of ``(batch, heads, tokens, channels)``."""
        x = x.float()
        theta, baseline = self._thresholds(x)
        return HeadCodes(
            self.neuron.encode(x, *self._by_channel(theta, baseline), self.steps), theta, baseline
        )

    def decode(self, coded: HeadCodes) -> Tensor:
        """Values that codes stand for, float32."""
        return self.neuron.decode(coded.codes, *self._by_channel(coded.theta, coded.baseline))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``decode(encode(x))`` in fewer passes."""
        if (found := fast_heads.fake_quantize(self, x)) is not None:
            return found
        x = x.float()
        return self.neuron.fake_quantize(x, *self._by_channel(*self._thresholds(x)), self.steps)

    def _thresholds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """θ and z for T = 1: a pair for each token and range, or for each channel where ranges run
        over the sequence.
        """
        thetas, baselines = [], []
        for index in range(self._ranges):
            part = (
                x * self._members[index] if self._ranges > 1 else x
            )  # a range includes zero anyway
            low, high = token_range(part) if self.axis == "token" else self._range_over_tokens(part)
            theta, baseline = threshold_for_range(
                low, high, self._top, symmetric=self.settings.symmetric, signed=self.neuron.signed
            )
            theta = _round_up(theta)
            if not (self.settings.symmetric or self.neuron.signed):
                baseline = half_up(-low / theta).nan_to_num(0.0).clamp(0, self._top)
            thetas.append(theta)
            baselines.append(baseline)
        if self.axis == "sequence":
            return thetas[0], baselines[0]
        return torch.cat(thetas, -1), torch.cat(baselines, -1)

    def to_rows(self, x: Tensor) -> Tensor:
        """``pack(encode(x))``."""
        found = fast_heads.to_rows(self, x)
        return self.pack(self.encode(x)) if found is None else found

    def plan(self, channels: int) -> Tensor | None:
        """What kernels need of this coder; None where they cannot run it."""
        if self._plan is None or self._plan[0] != channels:
            self._plan = channels, self._make_plan(channels)
        return self._plan[1]

    def _make_plan(self, channels: int) -> Tensor | None:
        if self.axis != "token" or not self._uniform or self._order.shape[-1] != channels:
            return None
        mode = (
            "signed"
            if self.neuron.signed
            else "symmetric"
            if self.settings.symmetric
            else "asymmetric"
        )
        steps = self.steps.squeeze(1)
        coding = HeadCoding(
            mode,
            self._top,
            self._ranges,
            self._order,
            self._of,
            steps * self.neuron.levels,
            self._fineness.squeeze(1),
            self._ordinary,
            self._bits,
            self.row_bytes(channels),
        )
        return make_head_plan(coding) if head_coding_fits(coding) else None

    def pack(self, coded: HeadCodes) -> Tensor:
        """One row of bytes a token and head: uint8 ``(batch, heads, tokens, row_bytes)``."""
        codes = coded.codes + self._shift
        ordered = codes.gather(-1, self._order[None, :, None].expand_as(codes))
        sections = [
            pack(part, bits)
            for part, bits in zip(
                ordered.split(self._lengths(ordered.shape[-1]), dim=-1), self._bits, strict=True
            )
        ]
        theta = coded.theta.to(torch.bfloat16).contiguous()
        theta = theta.masked_fill(theta.isnan(), torch.nan).view(torch.uint8)  # one NaN of the many
        return torch.cat([*sections, theta, coded.baseline.to(torch.uint8)], dim=-1)

    def unpack(self, rows: Tensor, channels: int) -> HeadCodes:
        """Inverse of :meth:`pack`."""
        lengths = self._lengths(channels)
        sizes = [
            packed_length(length, bits) for length, bits in zip(lengths, self._bits, strict=True)
        ]
        *sections, theta, baseline = rows.split([*sizes, 2 * self._ranges, self._ranges], dim=-1)
        parts = [
            unpack(part, bits, length).to(torch.int32)
            for part, bits, length in zip(sections, self._bits, lengths, strict=True)
        ]
        ordered = torch.cat(parts, dim=-1)
        codes = torch.empty_like(ordered).scatter_(
            -1, self._order[None, :, None].expand_as(ordered), ordered
        )
        return HeadCodes(
            codes - self._shift, theta.contiguous().view(torch.bfloat16).float(), baseline.float()
        )

    def row_bytes(self, channels: int) -> int:
        """Bytes of one cached token and head."""
        return (
            sum(
                packed_length(n, bits)
                for n, bits in zip(self._lengths(channels), self._bits, strict=True)
            )
            + _HEADER_BYTES * self._ranges
        )

    @property
    def _top(self) -> int:
        return self.neuron.levels * self.settings.steps

    @property
    def _shift(self) -> Tensor | int:
        return self.neuron.levels * self.steps if self.neuron.signed else 0

    @property
    def _bits(self) -> tuple[int, int]:
        """Bits of a code of an ordinary and of a salient channel."""
        span = 2 if self.neuron.signed else 1
        ordinary, salient = (
            span * self.neuron.levels * steps
            for steps in (self.settings.steps, self.settings.salient_steps)
        )
        return ordinary.bit_length(), max(ordinary, salient).bit_length()

    def _lengths(self, channels: int) -> list[int]:
        return [self._ordinary, channels - self._ordinary]

    def _by_channel(self, theta: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        """θ/T and T·z of every channel."""
        if self._ranges > 1:
            theta, baseline = (
                pair[..., :1] * self._members[0] + pair[..., 1:] * self._members[1]
                for pair in (theta, baseline)
            )
        if self.settings.salient_steps == self.settings.steps:
            return theta, baseline
        return theta / self._fineness, baseline * self._fineness

    @staticmethod
    def _range_over_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.amin(-2, keepdim=True).clamp(max=0), x.amax(-2, keepdim=True).clamp(min=0)


def _round_up(theta: Tensor) -> Tensor:
    """Smallest bfloat16 that is not below a positive float32; NaN stays NaN."""
    near = theta.to(torch.bfloat16)
    bits = near.view(torch.int16)
    higher = (bits + 1).view(torch.bfloat16)
    return torch.where(near.float() < theta, higher, near).float()
