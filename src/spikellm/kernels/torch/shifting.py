"""Spiking linear layers without any multiplication: weights are spikes of −1, 0 and 1, their scales
sums of powers of two, and thresholds, where inputs are coded, constants that are powers of two.

Whatever other layers multiply is added up or shifted here, to the same bits: sums of chosen inputs
or spikes, exponents of floating-point numbers that are added up.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from spikellm.kernels.spec import LinearSpec
from spikellm.kernels.torch.linear import TorchLinear, constants, in_stored_order
from spikellm.kernels.torch.product import sum_of_chosen
from spikellm.neurons import SoftResetNeuron
from spikellm.neurons.base import keeps
from spikellm.quantization.powers import ShiftedScales, shifted
from spikellm.quantization.thresholds import Threshold


def shifts(spec: LinearSpec) -> bool:
    """Whether a layer runs so: its spikes are unrolled, and all that it multiplies by are powers of
    two, or sums of them.
    """
    if spec.scale_terms is None or spec.execution == "merged" or spec.weights != "ternary":
        return False
    neuron = spec.neuron
    if neuron is None:
        return True
    powers = all(math.frexp(theta)[0] == 0.5 for theta, _ in spec.fixed)
    return bool(spec.fixed) and powers and neuron.centered and keeps(neuron, "encode")


class ShiftingLinear(TorchLinear):
    """A layer of additions and shifts alone."""

    def __init__(self, spec: LinearSpec, weights: object) -> None:
        super().__init__(spec, weights)  # type: ignore[arg-type]
        self._exponents = [math.frexp(theta)[1] - 1 for theta, _ in spec.fixed]

    def _encode(self, tokens: Tensor) -> tuple[Tensor, list[Threshold]]:
        spec, neuron = self.spec, cast(SoftResetNeuron, self.spec.neuron)
        x = in_stored_order(spec, tokens)
        found, codes = constants(spec, x), []
        for group, ((start, stop), steps) in enumerate(zip(spec.bounds, spec.steps, strict=True)):
            units = self._shifted(x[:, start:stop], -self._exponents[group])
            codes.append(neuron.encode_units(units, found[group].baseline, steps))
        return torch.cat(codes, 1), found

    def _product(self, plane: Tensor, weights: Tensor, largest: int) -> Tensor:
        spikes = plane.double()
        return sum_of_chosen(spikes, weights > 0) - sum_of_chosen(spikes, weights < 0)

    def _in_values(self, charge: Tensor, theta: Tensor, group: int) -> Tensor:
        moved = self._shifted(charge.float(), self._exponents[group])
        return torch.where(theta.isnan(), theta, moved)  # NaN where the token is not finite

    def _scaled(self, charge: Tensor, scale: Tensor) -> Tensor:
        return ShiftedScales(scale)(charge)

    @staticmethod
    def _shifted(x: Tensor, exponent: int) -> Tensor:
        moved = shifted(x.double(), torch.tensor(exponent, device=x.device))
        return torch.where(x - x == 0, moved.float(), x)
