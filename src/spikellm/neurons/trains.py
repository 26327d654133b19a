"""Trains of spikes that a count of spikes is unrolled to, and the membranes that fire them.

A code q with baseline z stands for ``θ·(q − z)``. The train of q itself (as published) fires z
spikes at rest, and its receivers take them off again. The train about the baseline is one of
``q − z``: so many spikes of its sign, and nothing at rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from spikellm.neurons.membrane import (
    Charge,
    Drive,
    Steps,
    Trace,
    fire_by_phase,
    horizon,
    integrate_and_fire,
)
from spikellm.neurons.phase import Recoding, iterate_digits
from spikellm.neurons.price import SpikeForm, at_levels, inhibited, phase_levels

TrainForm = Literal["centered", "published"]
"""Spikes of ``q − z``, which are silent at rest, or of the code q, which fires z at rest."""


@dataclass(frozen=True)
class Trains:
    """How a neuron's counts become spikes; its attributes are those of
    :class:`spikellm.neurons.base.SoftResetNeuron`.

    Trains and membranes raise ValueError where the neuron unrolls nothing.
    """

    levels: int
    signed: bool = False
    unrolls: bool = True
    centered: bool = False
    recoding: Recoding = "binary"
    price: float = 0.0
    priced: SpikeForm = "phase"

    @property
    def both_signs(self) -> bool:
        """Whether spikes may be negative."""
        return self.signed or self.centered

    @final
    def fired(self, code: Tensor, baseline: Tensor) -> Tensor:
        """Counts that trains are made of: spikes less negative spikes, int32; ``q − z`` of a
        centered neuron, else the code.

        Args:
            baseline: integers of any dtype that broadcast to ``code``.
        """
        return code - baseline.to(torch.int32) if self.centered else code

    @final
    def worth(self, units: Tensor, steps: Steps = 1) -> Tensor:
        """Current in thresholds as it is counted where spikes have a price, see
        :mod:`spikellm.neurons.price`; rounded to the nearest count it is the count.

        Args:
            units: float32.
        """
        if self.price == 0:
            return units
        if self.priced == "binary":
            return inhibited(units, self.price)
        levels = phase_levels(self.price, self.recoding, horizon(steps) * self.levels)
        return at_levels(units, levels, signed=self.signed)

    def stepped(self, count: Tensor, steps: Steps = 1) -> Tensor:
        """Spikes of the drained train, all full but the last: int32 ``(T, *count.shape)``, each at
        most L; ``sum(0) == count`` exactly.

        Args:
            count: see :meth:`fired`, as for the trains below.
        """
        return torch.stack(list(self.iterate_stepped(count, steps)))

    def binary(self, count: Tensor, steps: Steps = 1) -> Tensor:
        """Every spike unrolled to L binary spikes: int8 ``(T·L, *count.shape)`` of {0, 1}, or of
        {−1, 0, 1} with both signs; ``sum(0) == count`` exactly.
        """
        return torch.stack(list(self.iterate_binary(count, steps)))

    def phase(self, count: Tensor, steps: Steps = 1) -> Tensor:
        """Digits of the count, the largest power of two first: int8 ``(moments, *count.shape)``."""
        return torch.stack([plane for plane, _ in self.iterate_phase(count, steps)])

    def iterate_stepped(self, count: Tensor, steps: Steps = 1) -> Iterator[Tensor]:
        """The slices of :meth:`stepped`, one at a time."""
        self._check(count, steps)
        negative, magnitude = count < 0, count.abs()
        for step in range(horizon(steps)):
            spike = (magnitude - step * self.levels).clamp(0, self.levels)
            yield (torch.where(negative, -spike, spike) if self.both_signs else spike).to(
                torch.int32
            )

    def iterate_binary(self, count: Tensor, steps: Steps = 1) -> Iterator[Tensor]:
        """The slices of :meth:`binary`, one at a time: spike k of a step fires where the step's
        level is above k.
        """
        for spike in self.iterate_stepped(count, steps):
            for level in range(self.levels):
                plane = (spike.abs() > level).to(torch.int8)
                yield torch.where(spike < 0, -plane, plane) if self.both_signs else plane

    def iterate_phase(self, count: Tensor, steps: Steps = 1) -> Iterator[tuple[Tensor, int]]:
        """The slices of :meth:`phase`, one at a time, with the k of what each is worth, 2^k."""
        self._check(count, steps)
        return iterate_digits(count, horizon(steps) * self.levels, self.recoding)

    def simulate(
        self,
        current: Tensor,
        theta: Tensor,
        baseline: Tensor,
        steps: Steps = 1,
        drive: Drive = "drain",
    ) -> Trace:
        """Run the membrane step by step.

        Args:
            current: as for :meth:`encode`; finite.
            baseline: z as for :meth:`encode`; of a centered neuron at most T·L.
            drive: ``"drain"`` puts all charge in at the first step, ``"constant"`` x/T a step.

        Returns:
            :class:`Trace`; ``spikes.sum(0)`` equals :meth:`fired` of :meth:`encode` exactly, for
            either drive.
        """
        charge = self._charge(current, theta, baseline, steps)
        return integrate_and_fire(charge, steps, self.levels, drive)

    def simulate_phase(
        self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps = 1
    ) -> Trace:
        """Run the membrane through the moments of :meth:`phase`; arguments as for
        :meth:`simulate`.

        Returns:
            :class:`Trace`, whose spikes are those of :meth:`phase`.
        """
        charge = self._charge(current, theta, baseline, steps)
        return fire_by_phase(charge, horizon(steps) * self.levels, self.recoding)

    def _charge(self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps) -> Charge:
        self._require_unrolling()
        theta = theta.float()
        z = torch.as_tensor(baseline, device=current.device).long()
        top = torch.as_tensor(steps * self.levels, device=current.device)
        # A limit beyond any code changes nothing, and nothing overflows.
        limit = horizon(steps) * self.levels + (int(z.abs().max()) if z.numel() else 0) + 1
        units = self.worth(current.float() / theta, steps).clamp(-limit, limit).double()
        most = top.long().expand(units.shape)
        if not self.both_signs:
            sign = torch.ones_like(most)
            return Charge(units + z, sign, most, torch.zeros_like(most).bool(), theta.double())
        sign = torch.sign(units).long()
        strict = torch.zeros_like(most).bool()
        if self.centered and not self.signed:
            most = torch.where(sign < 0, z, top - z).clamp(min=0)
            strict = sign < 0
        return Charge(units.abs(), sign, most, strict, theta.double())

    def _require_unrolling(self) -> None:
        if not self.unrolls:
            raise ValueError(
                "the neuron has codes that no train of spikes reaches, so it runs in merged"
                " execution only; use gif"
            )

    def _check(self, count: Tensor, steps: Steps) -> None:
        self._require_unrolling()
        top = torch.as_tensor(steps * self.levels, device=count.device)
        low = -top if self.both_signs else top * 0
        if bool(((count > top) | (count < low)).any()):
            raise ValueError(
                f"codes from {int(count.min())} to {int(count.max())} do not fit"
                f" {int(low.min())} … {int(top.max())}, which {horizon(steps)} steps reach"
            )
