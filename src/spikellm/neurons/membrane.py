"""Membrane dynamics of soft-reset neurons, in 64-bit fixed point.

Potentials are in units of the threshold with 30 fractional bits, and scaled by T where charge
arrives over T steps, so that a constant current x/T is represented without rounding and the spike
count agrees with the merged code bit for bit, ties included.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spikellm.neurons.phase import Recoding, edges, places

Drive = Literal["drain", "constant"]
Steps = Tensor | int
"""Steps T of a train: one number, or an integer tensor that broadcasts to its codes, with one for
each channel (last axis), for each token (last but one), or both.
"""

_FRACTION = 30  # fractional bits of the membrane; float32 in [2**-7, 2**22] is represented exactly


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


class Charge(NamedTuple):
    """What the positive or the negative neuron of a pair gets; tensors of one shape.

    Attributes:
        units: float64, its current in thresholds.
        sign: int64, 1, −1, or 0 where nothing arrives.
        most: int64, the largest count that it reaches.
        strict: bool, whether it fires beyond its threshold only, not when it reaches it: a tie
            that the positive neuron rounds up is one that the negative neuron rounds down.
        theta: float64, threshold.
    """

    units: Tensor
    sign: Tensor
    most: Tensor
    strict: Tensor
    theta: Tensor

    def total(self) -> Tensor:
        """Charge in fixed point, int64."""
        return (self.units * 2.0**_FRACTION).round().long()


def horizon(steps: Steps) -> int:
    """The most steps that any code takes; 1 where there is no code."""
    if not isinstance(steps, Tensor):
        return steps
    return int(steps.max()) if steps.numel() else 1


def integrate_and_fire(charge: Charge, steps: Steps, levels: int, drive: Drive) -> Trace:
    """Run membranes step by step: charge, fire at most ``levels``, subtract what was fired.

    Args:
        drive: ``"drain"`` puts all charge in at the first step, ``"constant"`` x/T a step.
    """
    if drive not in ("drain", "constant"):
        raise ValueError(f"unknown drive {drive!r} (valid: drain, constant)")
    total, sign, left = charge.total(), charge.sign, charge.most
    alive_for = torch.as_tensor(steps, dtype=torch.long, device=total.device).expand(total.shape)
    # units of θ / (T · 2**30): the charge of one step of a constant current is then `total`, the
    # threshold T · 2**30
    threshold = alive_for << _FRACTION
    v = threshold // 2 - charge.strict.long()
    scale = charge.theta / threshold.double() * sign
    spikes, charged, membrane = [], [], []
    for step in range(horizon(steps)):
        alive = step < alive_for
        arriving = total if drive == "constant" else total * alive_for * (step == 0)
        v = torch.where(alive, v + arriving, v)
        charged.append(v * scale)
        fired = (v // threshold).clamp(0, levels)  # fire
        fired = torch.where(alive, torch.minimum(fired, left), 0)
        left = left - fired
        v = v - fired * threshold  # soft reset
        spikes.append((fired * sign).to(torch.int32))
        membrane.append(v * scale)
    return Trace(torch.stack(spikes), torch.stack(charged), torch.stack(membrane))


def fire_by_phase(charge: Charge, top: int, recoding: Recoding) -> Trace:
    """Run membranes whose spikes are worth powers of two, the largest first; see
    :mod:`spikellm.neurons.phase`. All charge is there at the start.

    Args:
        top: the largest count of all.

    Returns:
        :class:`Trace`, one moment for each power; the sum of spikes times their powers is the
        count. Potentials saturate at the largest count.
    """
    one = 1 << _FRACTION
    v = charge.total() + one // 2 - charge.strict.long()
    v = v.clamp(min=0).minimum((charge.most << _FRACTION) + one - 1)
    scale = charge.theta / one * charge.sign
    spikes, charged, membrane = [], [], []
    for place in reversed(range(places(top, recoding))):
        high, low = edges(place, recoding)
        fired = (v >= high * one).long()  # fire
        if low is not None:
            fired -= (v < low * one).long()
        charged.append(v * scale)
        v = v - fired * (one << place)  # soft reset
        spikes.append((fired * charge.sign).to(torch.int32))
        membrane.append(v * scale)
    return Trace(torch.stack(spikes), torch.stack(charged), torch.stack(membrane))
