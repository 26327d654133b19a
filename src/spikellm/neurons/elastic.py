"""Elastic bi-spiking neuron (SpikeLM, ICML 2024): a leaky ternary neuron of amplitude α.

    m(t) = m(t−1)/4 · (1 − |s(t−1)|) + x,   s(t) = sign(m) · 1[|m| ≥ α/2]

The input x is the same at each of T steps, and the output is the mean of ``α·s``: a count k of
spikes is worth ``α·k/T``, so θ is α/T and α the reach of the range. A neuron that has not fired
keeps a quarter of its potential, so with ``|x| ≥ e_p·α`` it fires in every p-th step,

    e_p = (1/2) · 3·4^(p−1) / (4^p − 1):   1/2, 2/5, 8/21 … towards 3/8,

and ``k = floor(T/p)`` for the least such p. That grows with ``|x|``: a code as any other, of levels
0, …, ⌊T/3⌋, ⌊T/2⌋, T, which products sum merged.

The published reset multiplies by ``α·(1 − s(t−1))``: nothing stays after a positive spike, α/4
after none, α/2 after a negative one, so what should be forgotten grows where α is above 2. It is
here as ``elastic-published``, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from spikellm.neurons.base import Drive, SoftResetNeuron, Steps, Trace, neurons
from spikellm.neurons.membrane import Charge, horizon
from spikellm.neurons.price import Levels, at_levels

_LEAK = 0.25
_LONGEST = 14
"""Silent steps behind which nothing fires any more: e_14 and 3/8 are closer than float32 tells
apart, while 64 bits hold the potential of so many steps without rounding.
"""
_FAR = 2.0**22  # thresholds; beyond any code


@dataclass(frozen=True)
class ElasticNeuron(SoftResetNeuron):
    """The repaired neuron. Its own membrane is that of the constant drive; where all charge is
    there at the start (drain, phase), it is a counter of its spikes that fires.
    """

    levels: int = 1
    signed: bool = True
    needs_training: ClassVar[str | None] = (
        "its levels are few and far apart, and a model that was not trained for them loses most of"
        " what it could"
    )
    stops_gradients: ClassVar[bool] = True

    def encode(self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps = 1) -> Tensor:
        units = (current.float() / theta.float()).nan_to_num(0.0, torch.inf, -torch.inf)
        return self._counts(units, theta, steps).to(torch.int32)

    def fake_quantize(
        self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps = 1
    ) -> Tensor:
        return self._counts(current.float() / theta, theta, steps).mul_(theta)

    def levels_of(self, steps: int) -> Levels | None:
        return elastic_levels(steps)

    def simulate(
        self,
        current: Tensor,
        theta: Tensor,
        baseline: Tensor,
        steps: Steps = 1,
        drive: Drive = "drain",
    ) -> Trace:
        if drive != "constant":
            return super().simulate(current, theta, baseline, steps, drive)
        units, theta = (current.float() / theta.float()).double(), theta.double()
        alive_for = torch.as_tensor(steps, device=current.device)
        spikes, charged, membrane = [], [], []
        for step, (potential, fired) in enumerate(self._run(units, theta, alive_for)):
            own = torch.where(step < alive_for, fired, 0)
            spikes.append(own.to(torch.int32))
            charged.append(potential * theta)
            membrane.append(potential * self._left(own, theta * alive_for) * theta)
        return Trace(torch.stack(spikes), torch.stack(charged), torch.stack(membrane))

    def _run(self, units: Tensor, theta: Tensor, steps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Potential in thresholds before firing, and what is fired, step by step; float64."""
        potential = torch.zeros_like(units)
        left = silent = torch.zeros_like(units)
        for _ in range(horizon(steps)):
            potential = (potential * left * _LEAK + units).clamp(-_FAR, _FAR)
            fired = torch.sign(potential) * (2 * potential.abs() >= steps) * (silent < _LONGEST)
            yield potential, fired
            silent = torch.where(fired == 0, silent + 1, 0)
            left = self._left(fired, theta * steps)

    def _counts(self, units: Tensor, theta: Tensor, steps: Steps) -> Tensor:
        """Sums of spikes, float32."""
        if not isinstance(steps, Tensor):
            return self._count(units, theta, steps)
        found = torch.zeros_like(units)
        for one in steps.unique().tolist():
            found = torch.where(steps == one, self._count(units, theta, one), found)
        return found

    def _count(self, units: Tensor, theta: Tensor, steps: int) -> Tensor:
        return at_levels(units, elastic_levels(steps), signed=True)

    def _left(self, fired: Tensor, amplitude: Tensor) -> Tensor:
        """By what the leaking potential is multiplied behind a step."""
        return 1 - fired.abs()

    def _charge(self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps) -> Charge:
        count = self.encode(current, theta, baseline, steps).double()
        size = count.abs()
        return Charge(
            size,
            torch.sign(count).long(),
            size.long(),
            torch.zeros_like(size).bool(),
            theta.double(),
        )


@dataclass(frozen=True)
class PublishedElasticNeuron(ElasticNeuron):
    """The neuron with the published reset; its counts depend on α itself."""

    def levels_of(self, steps: int) -> Levels | None:
        return None

    def _count(self, units: Tensor, theta: Tensor, steps: int) -> Tensor:
        units, theta = units.double(), theta.double()
        run = self._run(units, theta, torch.tensor(steps, device=units.device))
        count: Tensor = sum((fired for _, fired in run), torch.zeros_like(units))
        return count.float()

    def _left(self, fired: Tensor, amplitude: Tensor) -> Tensor:
        return amplitude * (1 - fired)


@lru_cache(maxsize=256)
def elastic_levels(steps: int) -> Levels:
    """Counts of T steps, and the least current in thresholds that gives each, float32."""
    least = {steps // p: Fraction(3 * 4 ** (p - 1), 2 * (4**p - 1)) for p in range(1, steps + 1)}
    counts = sorted(least)
    edges = torch.stack([_not_below(least[count] * steps) for count in counts])
    return Levels(edges, torch.tensor([0, *counts]))


def _not_below(value: Fraction) -> Tensor:
    """The smallest float32 number that is not below a positive fraction."""
    near = torch.tensor(float(value), dtype=torch.float32)
    return near if Fraction(float(near)) >= value else torch.nextafter(near, near + 1)


@neurons.register("elastic")
def elastic(bits: int = 2) -> SoftResetNeuron:
    """Elastic bi-spiking neuron; its spike takes two bits."""
    _check(bits)
    return ElasticNeuron()


@neurons.register("elastic-published")
def elastic_published(bits: int = 2) -> SoftResetNeuron:
    """The same with the published reset."""
    _check(bits)
    return PublishedElasticNeuron()


def _check(bits: int) -> None:
    if bits != 2:
        raise ValueError(f"an elastic spike takes 2 bits, not {bits}")
