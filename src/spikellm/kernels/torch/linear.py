"""Spiking linear layers in torch: every execution mode and every device.

    y[n, o] = Σ_segments θ_a[n] · s_w[o] · (Σ_c q[n, c]·k[o, c] − z_a[n]·Σ_c k[o, c])  +  bias[o]

``q`` are spike counts, ``k`` integer weights; a segment is a run of columns with one activation
group a and one weight group w. Merged execution is that product. The others add up the spikes of a
train: of q, whose baseline is taken off afterwards, or of ``q − z``, where nothing is left to do.
Weights are unpacked for every call, so nothing of a weight's size stays in memory and nothing can
go stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from spikellm.kernels.prepared import LinearWeights, Observed, by_column
from spikellm.kernels.spec import ExecutionMode, LinearSpec
from spikellm.kernels.torch.product import integer_product, sum_of_chosen
from spikellm.neurons import SoftResetNeuron
from spikellm.quantization.thresholds import (
    Threshold,
    coded_range,
    held,
    threshold_for_range,
)


class TorchLinear:
    """A layer in torch."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        self.spec, self._weights = spec, weights

    def __call__(self, x: Tensor) -> Tensor:
        return self.observed(x).y

    def observed(self, x: Tensor) -> Observed:
        """Output, codes and baselines, see :class:`spikellm.kernels.prepared.PreparedLinear`."""
        spec, bias = self.spec, self._weights.bias
        tokens = x.reshape(-1, spec.columns)
        codes = z = None
        if not spec.has_integers:
            y = self._dense(tokens)
        else:
            weights = self._weights.integer_weights()
            if spec.neuron is None:
                y = self._weight_only(tokens, weights)
            else:
                y, codes, z = self._spiking(tokens, weights)
            if bias is not None:
                y = y + bias.float()
        return Observed(y.to(x.dtype).reshape(*x.shape[:-1], spec.rows), codes, z)

    def _dense(self, tokens: Tensor) -> Tensor:
        bias = self._weights.bias
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.nn.functional.linear(
                tokens.float(),
                self._weights.dense_weight(),
                None if bias is None else bias.float(),
            )

    def _spiking(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec, scale = self.spec, self._weights.weight_scale.float()
        neuron = cast(SoftResetNeuron, spec.neuron)
        codes, thresholds = self._encode(tokens)
        y = torch.zeros(tokens.shape[0], spec.rows, dtype=torch.float32, device=tokens.device)
        for start, stop, group, weight_group in spec.segments:
            steps, (theta, baseline), k = (
                spec.most_steps(group),
                thresholds[group],
                weights[:, start:stop],
            )
            largest = 2 * int(neuron.top(steps)) * spec.weight_tops[weight_group] * (stop - start)
            merged, own = spec.execution == "merged", codes[:, start:stop]
            count = own if merged else neuron.fired(own, baseline)
            charge = torch.zeros((), device=tokens.device)
            for plane, doubles in spikes_of(count, neuron, steps, spec.execution):
                product = self._product(plane, k, largest)
                charge = (charge + charge if doubles else charge).to(product.dtype) + product
            if merged or not neuron.centered:
                charge -= baseline.to(charge.dtype) * k.sum(1, dtype=torch.int32).to(charge.dtype)
            y += self._scaled(self._in_values(charge, theta, group), scale[:, weight_group])
        z = [threshold.baseline.to(torch.int32).flatten() for threshold in thresholds]
        return y, codes, by_column(z, spec.bounds)

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
        scale = self._weights.weight_scale.float()
        parts = [
            tokens[:, s.start : s.stop]
            @ weights[:, s.start : s.stop].float().T
            * scale[:, s.weight_group]
            for s in self.spec.segments
        ]
        return cast(Tensor, sum(parts))

    def _by_additions(self, tokens: Tensor, weights: Tensor) -> Tensor:
        parts, scale = [], self._weights.weight_scale.float()
        for start, stop, _, weight_group in self.spec.segments:
            part, q = tokens[:, start:stop], weights[:, start:stop]
            charge = tokens.new_zeros(tokens.shape[0], self.spec.rows)
            for t in range(self.spec.weight_steps[weight_group]):
                charge += sum_of_chosen(part, q > t)
                charge -= sum_of_chosen(part, -q > t)
            parts.append(self._scaled(charge, scale[:, weight_group]))
        return cast(Tensor, sum(parts))

    def _encode(self, tokens: Tensor) -> tuple[Tensor, list[Threshold]]:
        return encode(self.spec, tokens)

    def _product(self, plane: Tensor, weights: Tensor, largest: int) -> Tensor:
        return integer_product(plane, weights, largest)

    def _in_values(self, charge: Tensor, theta: Tensor, group: int) -> Tensor:
        return charge.float() * theta

    def _scaled(self, charge: Tensor, scale: Tensor) -> Tensor:
        return charge * scale


def encode(spec: LinearSpec, x: Tensor) -> tuple[Tensor, list[Threshold]]:
    """Spike counts of inputs, for a layer that codes them.

    Args:
        x: ``(tokens, in)``.

    Returns:
        ``(codes, thresholds)``: int32 ``(tokens, in)`` with columns in stored order, and θ, z
        ``(tokens, 1)`` of each activation group.
    """
    neuron = cast(SoftResetNeuron, spec.neuron)
    x = in_stored_order(spec, x)
    codes: list[Tensor] = []
    if spec.fixed:
        found = constants(spec, x)
        for threshold, common, (start, stop) in zip(found, spec.steps, spec.bounds, strict=True):
            codes.append(neuron.encode(x[:, start:stop], *threshold, common))
        return torch.cat(codes, dim=1), found
    found = []
    for group, (common, (start, stop), (first, last)) in enumerate(
        zip(spec.steps, spec.bounds, spec.ranges, strict=True)
    ):
        steps = common if spec.massive is None else spec.massive.steps_of(x, common)
        low, high = coded_range(x[:, first:last], spec.share(group), spec.threshold_source)
        threshold = threshold_for_range(
            low, high, neuron.top(steps), symmetric=spec.symmetric, signed=neuron.signed
        )
        codes.append(neuron.encode(x[:, start:stop], *threshold, steps))
        found.append(threshold)
    return torch.cat(codes, dim=1), found


def in_stored_order(spec: LinearSpec, x: Tensor) -> Tensor:
    """Inputs ``(tokens, in)`` in float32, columns in stored order."""
    return x.float() if spec.order is None else x.float().index_select(1, spec.order)


def constants(spec: LinearSpec, x: Tensor) -> list[Threshold]:
    """Thresholds that are the same for every token, ``(tokens, 1)`` of each activation group."""
    theta, baseline = held(Threshold(*x.new_tensor(spec.fixed).unbind(1)), x)
    pairs = zip(theta.split(1, 1), baseline.split(1, 1), strict=True)
    return [Threshold(*pair) for pair in pairs]


def spikes_of(
    count: Tensor, neuron: SoftResetNeuron, steps: int, execution: ExecutionMode
) -> Iterator[tuple[Tensor, bool]]:
    """The spikes of a train in one execution mode, slice by slice, and whether what has been summed
    doubles before a slice is added; that ends in the counts.
    """
    if execution == "merged":
        return iter(((count, False),))
    if execution == "phase":
        return ((plane, True) for plane, _ in neuron.iterate_phase(count, steps))
    unroll = neuron.iterate_stepped if execution == "stepped" else neuron.iterate_binary
    return ((plane, False) for plane in unroll(count, steps))
