"""Spiking neurons: what all of them are made from, with the membrane dynamics that they share.

A spike train is stored *merged*: one integer code for each value. The *stepped* train (T spikes of
at most L) and the *binary* train (every spike unrolled to {0, 1} or {−1, 0, 1}) are derived from
the code and sum to it exactly, so one integer product replaces the products of all steps.

Membrane potentials are computed in 64-bit fixed point, in units of the threshold with 30 fractional
bits and scaled by T, so that a constant current x/T is represented without rounding and the spike
count agrees with the merged code bit for bit, ties included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.core.registry import Registry
from spikellm.quantization.rounding import half_up

Drive = Literal["drain", "constant"]
Steps = Tensor | int
"""Steps T of a train: one number, or an integer tensor that broadcasts to its codes, with one for
each channel (last axis), for each token (last but one), or both.
"""

_FRACTION = 30  # fractional bits of the membrane; float32 in [2**-7, 2**22] is represented exactly
_CHARGE_LIMIT = 2.0**22  # thresholds; beyond any code, so clamping here changes nothing


class Trace(NamedTuple):
    """The states of a neuron over time; all ``(T, *shape)``.

    Attributes:
        spikes: int32, spike of each step.
        charged: float64, membrane potential after charging, before firing, in the units of the
            input.
        membrane: float64, membrane potential after the soft reset.
    """

    spikes: Tensor
    charged: Tensor
    membrane: Tensor


neurons: Registry[Callable[[int], SoftResetNeuron]] = Registry("neuron")
"""Factories by name: bits of a spike → neuron.

A factory raises ValueError where the bits do not fit the neuron.
"""


@dataclass(frozen=True)
class SoftResetNeuron:
    """Integrate, fire ``clip(floor(v/θ), 0, L)``, subtract ``θ·s``: the neuron from which IF, GIF
    and ternary GIF are made.

    The membrane starts at θ/2 plus the baseline's charge. With a constant current x/T, or with all
    of x at the first step, the spike count over T steps is ``clip(floor(x/θ + 1/2) + z, 0, T·L)``
    (SpikeLLM, §3.1): a uniform quantizer. A signed neuron is a positive and a negative one merged;
    each sees the current with its own sign, and only one of them ever reaches threshold.

    A subclass may override :meth:`top`, :meth:`encode` and the trains. Kernels and products rely on
    codes in ``[0, top]``, or ``[−top, top]`` if signed, that stand for ``θ·(q − z)``.

    Attributes:
        levels: L, the largest magnitude of one spike.
        signed: whether spikes may be negative.
        unrolls: whether every code is a train of spikes; otherwise it runs merged only.
    """

    levels: int
    signed: bool = False
    unrolls: bool = True

    def top(self, steps: Steps) -> Steps:
        """Largest code, T·L."""
        return steps * self.levels

    def encode(self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps = 1) -> Tensor:
        """Merged code of a current: the spike count of T steps.

        Args:
            current: ``(..., channels)``, float16, bfloat16 or float32; computed in float32.
            theta: threshold θ > 0, broadcast to ``current``.
            baseline: z, the code of zero current, integers of any dtype; must be 0 for a signed
                neuron.
            steps: T, see :data:`Steps`.

        Returns:
            int32 codes of the shape of ``current``, in ``[0, T·L]`` or ``[−T·L, T·L]``. Infinite
            current saturates; NaN gives 0.
        """
        top = torch.as_tensor(self.top(steps), dtype=torch.float32, device=current.device)
        units = (current.float() / theta.float()).nan_to_num(0.0, torch.inf, -torch.inf)
        if self.signed:
            return (
                torch.sign(units)
                * torch.minimum(half_up(units.abs().clamp(max=_CHARGE_LIMIT)), top)
            ).to(torch.int32)
        code = half_up(units.clamp(-_CHARGE_LIMIT, _CHARGE_LIMIT)) + baseline
        return torch.minimum(code.clamp(min=0), top).to(torch.int32)

    @final
    def decode(self, code: Tensor, theta: Tensor, baseline: Tensor) -> Tensor:
        """Value that a code stands for, ``θ·(q − z)``, float32."""
        return theta.float() * (code - baseline).float()

    def fake_quantize(
        self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps = 1
    ) -> Tensor:
        """``decode(encode(current))`` for currents in the range of θ and z; in fewer passes, unless
        a subclass encodes in a way of its own.
        """
        if not keeps(self, "encode"):
            return self.decode(self.encode(current, theta, baseline, steps), theta, baseline)
        top = torch.as_tensor(self.top(steps), dtype=torch.float32, device=current.device)
        units = current.float() / theta
        if self.signed:
            code = half_up(units.abs()).minimum(top).copysign_(units)
        else:
            code = half_up(units).add_(baseline).clamp_(min=0)
            code = torch.minimum(code, top, out=code).sub_(baseline)
        return code.mul_(theta)

    def stepped(self, code: Tensor, steps: Steps = 1) -> Tensor:
        """Spikes of the drained train, all full but the last: int32 ``(T, *code.shape)``, each at
        most L; ``sum(0) == code`` exactly.
        """
        return torch.stack(list(self.iterate_stepped(code, steps)))

    def binary(self, code: Tensor, steps: Steps = 1) -> Tensor:
        """Every spike unrolled to L binary spikes: int8 ``(T·L, *code.shape)`` of {0, 1}, or of
        {−1, 0, 1} if signed; ``sum(0) == code`` exactly.
        """
        return torch.stack(list(self.iterate_binary(code, steps)))

    def iterate_stepped(self, code: Tensor, steps: Steps = 1) -> Iterator[Tensor]:
        """The slices of :meth:`stepped`, one at a time."""
        self._check(code, steps)
        sign, magnitude = torch.sign(code), code.abs()
        for step in range(_horizon(steps)):
            spike = (magnitude - step * self.levels).clamp(0, self.levels)
            yield (sign * spike if self.signed else spike).to(torch.int32)

    def iterate_binary(self, code: Tensor, steps: Steps = 1) -> Iterator[Tensor]:
        """The slices of :meth:`binary`, one at a time: spike k of a step fires where the step's
        level is above k.
        """
        for spike in self.iterate_stepped(code, steps):
            for level in range(self.levels):
                plane = (spike.abs() > level).to(torch.int8)
                yield plane * torch.sign(spike).to(torch.int8) if self.signed else plane

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
            drive: ``"drain"`` puts all charge in at the first step, ``"constant"`` x/T a step.

        Returns:
            :class:`Trace`; ``spikes.sum(0)`` equals :meth:`encode` exactly, for either drive.
        """
        if drive not in ("drain", "constant"):
            raise ValueError(f"unknown drive {drive!r} (valid: drain, constant)")
        theta, baseline = theta.float(), torch.as_tensor(baseline, device=current.device)
        # A limit beyond any code changes nothing, and nothing overflows.
        limit = float(torch.as_tensor(self.top(steps)).max() + baseline.abs().max()) + 1
        units = (current.float() / theta).clamp(-limit, limit).double()
        sign = (
            torch.sign(units).long()
            if self.signed
            else torch.ones((), dtype=torch.long, device=current.device)
        )
        total = (units * 2.0**_FRACTION).round().long() * sign
        if not self.signed:
            total = total + (baseline.long() << _FRACTION)
        horizon = torch.as_tensor(steps, dtype=torch.long, device=current.device).expand(
            total.shape
        )
        # units of θ / (T · 2**30): the charge of one step of a constant current is then `total`,
        # the threshold T · 2**30
        threshold = horizon << _FRACTION
        v = (threshold // 2).clone()
        scale = theta.double() / threshold.double() * sign
        spikes, charged, membrane = [], [], []
        for step in range(_horizon(steps)):
            alive = step < horizon
            arriving = total if drive == "constant" else total * horizon * (step == 0)
            v = torch.where(alive, v + arriving, v)
            charged.append(v * scale)
            fired = torch.where(alive, (v // threshold).clamp(0, self.levels), 0)  # fire
            v = v - fired * threshold  # soft reset
            spikes.append((fired * sign).to(torch.int32))
            membrane.append(v * scale)
        return Trace(torch.stack(spikes), torch.stack(charged), torch.stack(membrane))

    def _check(self, code: Tensor, steps: Steps) -> None:
        top = torch.as_tensor(steps * self.levels, device=code.device)
        low = -top if self.signed else top * 0
        if bool(((code > top) | (code < low)).any()):
            raise ValueError(
                f"codes from {int(code.min())} to {int(code.max())} do not fit {int(low.min())} …"
                f" {int(top.max())}, which {_horizon(steps)} steps reach"
            )


def keeps(neuron: SoftResetNeuron, *methods: str) -> bool:
    """Whether a neuron has these methods as :class:`SoftResetNeuron` defines them, so that a
    kernel may do the same in their place.
    """
    return all(getattr(type(neuron), one) is getattr(SoftResetNeuron, one) for one in methods)


def _horizon(steps: Steps) -> int:
    return int(steps.max()) if isinstance(steps, Tensor) else steps


def make_neuron(name: str, bits: int) -> SoftResetNeuron:
    """Make a neuron by its registered name.

    Raises:
        RequestError: the name is not registered, or what its factory makes is no soft-reset neuron
            or decodes in a way of its own.
        ValueError: the neuron does not support spikes of so many bits.
    """
    neuron = neurons[name](bits)
    if not isinstance(neuron, SoftResetNeuron):
        raise RequestError(
            f"neuron {name!r} is a {type(neuron).__name__}; expected a SoftResetNeuron: derive its"
            " class from spikellm.neurons.SoftResetNeuron"
        )
    if not keeps(neuron, "decode"):
        raise RequestError(
            f"neuron {name!r} overrides decode; products take its codes to stand for θ·(q − z), so"
            " leave decode as it is"
        )
    return neuron


def unrolling(bits: int) -> list[str]:
    """Names of the neurons that emit spikes of so many bits and unroll their codes in time."""
    found = []
    for name in neurons.names():
        with suppress(ValueError):  # not of so many bits
            if make_neuron(name, bits).unrolls:
                found.append(name)
    return found
