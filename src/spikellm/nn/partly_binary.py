"""A linear layer as PB-LLM has it (Shang et al., ICLR 2024): most weights are ±α, a few salient
ones keep 8 bits. A baseline.

Which weights are salient is a bit mask over the whole matrix, so a layer takes 2 bits a weight and
8 bits more for each salient one; PB-LLM counts 1 step for a binary weight and 8 for a salient one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.nn.layout import most_weight_groups
from spikellm.nn.linear import SpikingLinear, layer_kinds
from spikellm.quantization.packing import pack, packed_length, unpack


class PartlyBinaryWeights(NamedTuple):
    """Codes of a partly binary weight matrix.

    Attributes:
        salient: bool, ``(out, in)``.
        positive: bool, ``(out, in)``: sign of a binary weight.
        scale: α, float32, ``(out, groups)``.
        codes: uint8, ``(out, in)``, used where salient.
        salient_scale, salient_zero: ``(out, 1)``, float32 and uint8.
    """

    salient: Tensor
    positive: Tensor
    scale: Tensor
    codes: Tensor
    salient_scale: Tensor
    salient_zero: Tensor


@layer_kinds.register("partly-binary")
class PartlyBinaryLinear(SpikingLinear):
    """Persistent state beside that of any spiking layer: ``salient_mask``, ``signs`` (uint8, one
    bit a weight, ``(out, bytes)``), ``salient_codes`` (uint8, one
    byte for each salient weight, row by row), ``weight_scale`` ``(out, groups)``, ``salient_scale``
    and ``salient_zero`` ``(out, 1)``.

    Attributes:
        sizes: how many weights are salient.
    """

    salient_mask: Tensor
    signs: Tensor
    salient_scale: Tensor
    salient_zero: Tensor

    def _register_weights(self, device: torch.device | str | None) -> None:
        rows, packed = self.out_features, packed_length(self.in_features, 1)
        self.register_buffer(
            "salient_mask", torch.zeros(rows, packed, dtype=torch.uint8, device=device)
        )
        self.register_buffer("signs", torch.zeros(rows, packed, dtype=torch.uint8, device=device))
        self.register_buffer(
            "salient_codes", torch.zeros(*(self.sizes or (0,)), dtype=torch.uint8, device=device)
        )
        groups = most_weight_groups(self.in_features, self.settings)
        self.register_buffer(
            "weight_scale", torch.ones(rows, groups, dtype=torch.float32, device=device)
        )
        self.register_buffer(
            "salient_scale", torch.ones(rows, 1, dtype=torch.float32, device=device)
        )
        self.register_buffer("salient_zero", torch.zeros(rows, 1, dtype=torch.uint8, device=device))

    @classmethod
    def sizes_of(cls, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (state["salient_codes"].shape[0],)

    @property
    def salient_share(self) -> float:
        """Share of weights with 8 bits."""
        return self.salient_codes.shape[0] / (self.in_features * self.out_features)

    @property
    def additive_share(self) -> float:
        return 1.0 - self.salient_share

    @property
    def average_steps(self) -> float:
        """As PB-LLM counts: 1 for a binary weight, one a bit for a salient one."""
        return 1.0 + (self.settings.weights.bits - 1) * self.salient_share

    @torch.no_grad()
    def set_partly_binary(self, weights: PartlyBinaryWeights) -> None:
        """Take over codes."""
        self.salient_mask.copy_(pack(weights.salient.to(torch.uint8), 1))
        self.signs.copy_(pack(weights.positive.to(torch.uint8), 1))
        self.salient_codes.copy_(weights.codes[weights.salient])
        self.weight_scale[:, : weights.scale.shape[1]] = weights.scale
        self.salient_scale.copy_(weights.salient_scale)
        self.salient_zero.copy_(weights.salient_zero)

    def validation_error(self) -> str | None:
        salient = int(unpack(self.salient_mask, 1, self.in_features).sum(dtype=torch.int64))
        if salient != self.salient_codes.shape[0]:
            return (
                f"salient_mask marks {salient} weights, and there are {self.salient_codes.shape[0]}"
                " codes for them"
            )
        good = torch.isfinite(self.salient_scale) & (self.salient_scale > 0)
        return (
            None
            if bool(good.all())
            else "salient_scale holds values that are not finite and positive"
        )

    def integer_weights(self, rows: slice = slice(None)) -> Tensor:
        raise RequestError(
            "a partly binary layer has no integer form: its binary and its 8-bit weights have"
            " scales of their own"
        )

    def dense_weight(self) -> Tensor:
        """The weight that the codes stand for, float32, ``(out, in)``."""
        positive = unpack(self.signs, 1, self.in_features).float()
        weight = 2 * positive - 1
        for group, (start, stop) in enumerate(self.layout().weight_groups):
            weight[:, start:stop] *= self.weight_scale[:, group : group + 1]
        mask = unpack(self.salient_mask, 1, self.in_features).bool()
        rows = mask.nonzero()[:, 0]
        weight[mask] = (
            self.salient_codes.float() - self.salient_zero[rows, 0].float()
        ) * self.salient_scale[rows, 0]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` → ``(..., out)``."""
        with torch.autocast(x.device.type, enabled=False):
            y = torch.nn.functional.linear(
                x.float(), self.dense_weight(), None if self.bias is None else self.bias.float()
            )
        return y.to(x.dtype)
