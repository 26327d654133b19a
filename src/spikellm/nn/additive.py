"""A linear layer made of additions alone: weights are ternary spikes, ``w ≈ α·Σ_t s(t)`` with
``s(t) ∈ {−1, 0, +1}``.

    y[n, o] = Σ_segments α[o, segment] · Σ_t ( Σ_{c: s=+1} x[n, c] − Σ_{c: s=−1} x[n, c] )  +
    bias[o]

Every step adds an input, skips it or subtracts it; one scaling a row and segment ends the sum. A
step is a plane of +1 and a plane of −1, one bit a weight each. Columns take different numbers of
steps; columns of equal steps share α in each row. With coded inputs the sums are integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from spikellm.nn.layout import most_weight_groups
from spikellm.nn.linear import SpikingLinear, layer_kinds
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.packing import pack, packed_length, unpack


@layer_kinds.register("ternary")
class AdditiveLinear(SpikingLinear):
    """Persistent state beside that of any spiking layer: ``spikes_plus`` and ``spikes_minus``
    (uint8, ``(out, bytes)``: the planes one after the other, each
    with one bit for every column that takes so many steps, in stored order), ``column_steps``
    (uint8, ``(in,)``) and ``weight_scale`` (float32, ``(out, groups)``).

    Attributes:
        sizes: columns that take at least 1, 2, … steps; decides the shapes of the planes.
    """

    spikes_plus: Tensor
    spikes_minus: Tensor
    unrolls_weights = True

    def _register_weights(self, device: torch.device | str | None) -> None:
        sizes = self.sizes or (self.in_features,)
        length = sum(packed_length(columns, 1) for columns in sizes)
        for name in ("spikes_plus", "spikes_minus"):
            self.register_buffer(
                name, torch.zeros(self.out_features, length, dtype=torch.uint8, device=device)
            )
        self.register_buffer(
            "column_steps", torch.ones(self.in_features, dtype=torch.uint8, device=device)
        )
        groups = most_weight_groups(self.in_features, self.settings, max(2, len(sizes)))
        self.register_buffer(
            "weight_scale",
            torch.ones(self.out_features, groups, dtype=torch.float32, device=device),
        )

    @classmethod
    def sizes_of(cls, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        steps = state["column_steps"]
        if steps.dtype != torch.uint8:
            raise ValueError(f"column_steps holds {steps.dtype}, expected {torch.uint8}")
        return plane_sizes(steps)

    @property
    def additive_share(self) -> float:
        return 1.0

    @torch.no_grad()
    def set_weights(self, weights: AffineWeights) -> None:
        """Store codes ``−T … T`` (zero-points are not used); columns in stored order."""
        steps = self.stored(self.column_steps)
        for name, sign in (("spikes_plus", 1), ("spikes_minus", -1)):
            planes = [
                pack((sign * weights.codes[:, steps > t] > t).to(torch.uint8), 1)
                for t in range(int(steps.max()))
            ]
            getattr(self, name).copy_(torch.cat(planes, 1))
        self.weight_scale[:, : weights.scale.shape[1]] = weights.scale

    def integer_weights(self, rows: slice = slice(None)) -> Tensor:
        """Integer weights ``Σ_t s(t)`` of some outputs, all by default: int16, ``(out, in)``,
        columns in stored order.
        """
        steps = self.stored(self.column_steps)
        total = torch.zeros(
            len(self.spikes_plus[rows]),
            self.in_features,
            dtype=torch.int16,
            device=self.spikes_plus.device,
        )
        for t, (plus, minus) in enumerate(self.planes(rows)):
            total[:, steps > t] += plus.to(torch.int16) - minus.to(torch.int16)
        return total

    def planes(self, rows: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
        """``(plus, minus)`` of every step, uint8 {0, 1}, ``(out, columns of that step)``."""
        lengths = [packed_length(columns, 1) for columns in self.sizes]
        parts = zip(
            self.spikes_plus[rows].split(lengths, 1),
            self.spikes_minus[rows].split(lengths, 1),
            self.sizes,
            strict=True,
        )
        return [
            (unpack(plus, 1, columns), unpack(minus, 1, columns)) for plus, minus, columns in parts
        ]

    def validation_error(self) -> str | None:
        if plane_sizes(self.column_steps) != self.sizes or int(self.column_steps.min()) < 1:
            return (
                f"column_steps fits {plane_sizes(self.column_steps)} columns by step, config.json"
                f" says {self.sizes}"
            )
        overlap = any(bool((plus & minus).any()) for plus, minus in self.planes())
        return "spikes_plus and spikes_minus fire at once" if overlap else None

    def _sum_of_segments(self, tokens: Tensor, weights: Tensor) -> Tensor:
        if self.form == "merged":
            return super()._sum_of_segments(tokens, weights)
        parts = []
        for segment in self.layout().segments:
            part, q = (
                tokens[:, segment.start : segment.stop],
                weights[:, segment.start : segment.stop],
            )
            charge = tokens.new_zeros(tokens.shape[0], self.out_features)
            for t in range(self.layout().weight_steps[segment.weight_group]):
                charge += sum_of_chosen(part, q > t)
                charge -= sum_of_chosen(part, -q > t)
            parts.append(charge * self.weight_scale[:, segment.weight_group])
        return cast(Tensor, sum(parts))


def plane_sizes(column_steps: Tensor) -> tuple[int, ...]:
    """Columns that take at least 1, 2, … steps."""
    return tuple(int((column_steps > t).sum()) for t in range(int(column_steps.max())))


def sum_of_chosen(x: Tensor, chosen: Tensor) -> Tensor:
    """Sums of inputs, by additions alone.

    Args:
        x: ``(tokens, in)``, floating point.
        chosen: bool, ``(out, in)``: which inputs each output adds up.

    Returns:
        ``(tokens, out)``.
    """
    counts = chosen.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    columns = chosen.nonzero()[:, 1]
    return torch.nn.functional.embedding_bag(columns, x.T.contiguous(), offsets, mode="sum").T
