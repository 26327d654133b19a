"""Spiking linear layers in torch: every execution mode and every device.

    y[n, o] = Σ_segments θ_a[n] · s_w[o] · (Σ_c q[n, c]·k[o, c] − z_a[n]·Σ_c k[o, c])  +  bias[o]

``q`` are spike counts, ``k`` integer weights; a segment is a run of columns with one activation
group a and one weight group w. Weights are unpacked for every call, so nothing of a weight's size
stays in memory and nothing can go stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from spikellm.kernels.base import LinearWeights
from spikellm.kernels.spec import ExecutionMode, LinearSpec
from spikellm.kernels.torch.product import integer_product, sum_of_chosen
from spikellm.neurons import SoftResetNeuron
from spikellm.quantization.thresholds import (
    Threshold,
    part_of_range,
    threshold_for_range,
    token_range,
)


class TorchLinear:
    """A layer in torch."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        self.spec, self._weights = spec, weights

    def __call__(self, x: Tensor) -> Tensor:
        return self.observed(x)[0]

    def observed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and spike counts, see :class:`spikellm.kernels.base.PreparedLinear`."""
        spec, bias = self.spec, self._weights.bias
        tokens, codes = x.reshape(-1, spec.columns), None
        if spec.weights == "none":
            y = self._dense(tokens)
        else:
            weights = self._weights.integer_weights()
            if spec.neuron is None:
                y = self._weight_only(tokens, weights)
            else:
                y, codes = self._spiking(tokens, weights)
            if bias is not None:
                y = y + bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.rows), codes

    def _dense(self, tokens: Tensor) -> Tensor:
        bias = self._weights.bias
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.nn.functional.linear(
                tokens.float(),
                self._weights.dense_weight(),
                None if bias is None else bias.float(),
            )

    def _spiking(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        spec, scale = self.spec, self._weights.weight_scale
        neuron = cast(SoftResetNeuron, spec.neuron)
        codes, thresholds = encode(spec, tokens)
        y = torch.zeros(tokens.shape[0], spec.rows, dtype=torch.float32, device=tokens.device)
        for start, stop, group, weight_group in spec.segments:
            steps, (theta, baseline), k = (
                spec.most_steps(group),
                thresholds[group],
                weights[:, start:stop],
            )
            largest = 2 * int(neuron.top(steps)) * spec.weight_tops[weight_group] * (stop - start)
            planes = spikes_of(codes[:, start:stop], neuron, steps, spec.execution)
            charge = cast(Tensor, sum(integer_product(plane, k, largest) for plane in planes))
            charge -= baseline.to(charge.dtype) * k.sum(1, dtype=torch.int32).to(charge.dtype)
            y += charge.float() * theta * scale[:, weight_group]
        return y, codes

    def _weight_only(self, tokens: Tensor, weights: Tensor) -> Tensor:
        order = self.spec.order
        tokens = tokens.float() if order is None else tokens.float().index_select(1, order)
        by_additions = self.spec.execution != "merged"
        with torch.autocast(tokens.device.type, enabled=False):
            return (
                self._by_additions(tokens, weights)
                if by_additions
                else self._by_products(tokens, weights)
            )

    def _by_products(self, tokens: Tensor, weights: Tensor) -> Tensor:
        scale = self._weights.weight_scale
        parts = [
            tokens[:, s.start : s.stop]
            @ weights[:, s.start : s.stop].float().T
            * scale[:, s.weight_group]
            for s in self.spec.segments
        ]
        return cast(Tensor, sum(parts))

    def _by_additions(self, tokens: Tensor, weights: Tensor) -> Tensor:
        parts = []
        for start, stop, _, weight_group in self.spec.segments:
            part, q = tokens[:, start:stop], weights[:, start:stop]
            charge = tokens.new_zeros(tokens.shape[0], self.spec.rows)
            for t in range(self.spec.weight_steps[weight_group]):
                charge += sum_of_chosen(part, q > t)
                charge -= sum_of_chosen(part, -q > t)
            parts.append(charge * self._weights.weight_scale[:, weight_group])
        return cast(Tensor, sum(parts))


def encode(spec: LinearSpec, x: Tensor) -> tuple[Tensor, list[Threshold]]:
    """Spike counts of inputs, for a layer that codes them.

    Args:
        x: ``(tokens, in)``.

    Returns:
        ``(codes, thresholds)``: int32 ``(tokens, in)`` with columns in stored order, and θ, z
        ``(tokens, 1)`` of each activation group.
    """
    neuron = cast(SoftResetNeuron, spec.neuron)
    x = x.float() if spec.order is None else x.float().index_select(1, spec.order)
    codes, thresholds = [], []
    for common, (start, stop), (first, last) in zip(
        spec.steps, spec.bounds, spec.ranges, strict=True
    ):
        steps = common if spec.massive is None else spec.massive.steps_of(x, common)
        low, high = part_of_range(*token_range(x[:, first:last]), spec.range_share)
        threshold = threshold_for_range(
            low, high, neuron.top(steps), symmetric=spec.symmetric, signed=neuron.signed
        )
        codes.append(neuron.encode(x[:, start:stop], *threshold, steps))
        thresholds.append(threshold)
    return torch.cat(codes, dim=1), thresholds


def spikes_of(
    codes: Tensor, neuron: SoftResetNeuron, steps: int, execution: ExecutionMode
) -> Iterator[Tensor]:
    """The spikes of a train in one execution mode, slice by slice; they sum to the codes."""
    if execution == "merged":
        return iter((codes,))
    unroll = neuron.iterate_stepped if execution == "stepped" else neuron.iterate_binary
    return unroll(codes, steps)
