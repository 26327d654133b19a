"""Spiking neurons: what all of them are made from, with the membrane dynamics that they share.

A spike train is stored *merged*: one integer code for each value. The *stepped* train (T spikes of
at most L) and the *binary* train (every spike unrolled to {0, 1} or {−1, 0, 1}) are derived from
the code and sum to it exactly, so one integer product replaces the products of all steps. So does
the *phase* train, whose spikes are worth powers of two (:mod:`spikellm.neurons.phase`).

A code q with baseline z stands for ``θ·(q − z)``. The train of q itself (as published) fires z
spikes at rest, and its receivers take them off again. The train about the baseline is one of
``q − z``: so many spikes of its sign, and nothing at rest.

Membranes are those of :mod:`spikellm.neurons.membrane`; their spike count agrees with the merged
code bit for bit, ties included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.core.registry import Registry
from spikellm.neurons.membrane import Drive, Steps, Trace
from spikellm.neurons.phase import Recoding
from spikellm.neurons.price import Levels, SpikeForm, whole_price
from spikellm.neurons.trains import TrainForm, Trains
from spikellm.quantization.rounding import half_up

__all__ = [
    "Drive",
    "Recoding",
    "SoftResetNeuron",
    "SpikeForm",
    "Steps",
    "Trace",
    "TrainForm",
    "keeps",
    "make_neuron",
    "neurons",
    "price_misfit",
    "unrolling",
    "with_price",
    "with_train",
]

_CHARGE_LIMIT = 2.0**22  # thresholds; beyond any code, so clamping here changes nothing

neurons: Registry[Callable[[int], SoftResetNeuron]] = Registry("neuron")
"""Factories by name: bits of a spike → neuron.

A factory raises ValueError where the bits do not fit the neuron.
"""


@dataclass(frozen=True)
class SoftResetNeuron(Trains):
    """Integrate, fire ``clip(floor(v/θ), 0, L)``, subtract ``θ·s``: the neuron from which IF, GIF
    and ternary GIF are made.

    The membrane starts at θ/2 plus the baseline's charge. With a constant current x/T, or with all
    of x at the first step, the spike count over T steps is ``clip(floor(x/θ + 1/2) + z, 0, T·L)``
    (SpikeLLM, §3.1): a uniform quantizer. A signed neuron is a positive and a negative one merged;
    each sees the current with its own sign, and only one of them ever reaches threshold.

    A centered neuron is such a pair too, of T·L − z and of z levels, and starts without the
    baseline's charge: it counts ``clip(floor(x/θ + 1/2) + z, 0, T·L) − z``, the same code less its
    baseline. Codes are the same either way.

    A subclass may override :meth:`top`, :meth:`encode` and the trains. Kernels and products rely on
    codes in ``[0, top]``, or ``[−top, top]`` if signed, that stand for ``θ·(q − z)``.

    Attributes:
        levels: L, the largest magnitude of one spike.
        signed: whether spikes may be negative.
        unrolls: whether every code is a train of spikes; otherwise it runs merged only.
        centered: whether its trains are of ``q − z``, see :data:`TrainForm`.
        recoding: digits of its phase trains.
        price, priced: λ, the price of a spike in squared thresholds, and of which spikes, see
            :mod:`spikellm.neurons.price`; 0 to round to the nearest code.
        needs_training: why a model that fires it has to be trained for it; None where conversion
            alone will do.
        stops_gradients: whether values beyond the range, which its top code stands for, pass no
            gradient in training; otherwise all pass it straight through.
    """

    needs_training: ClassVar[str | None] = None
    stops_gradients: ClassVar[bool] = False

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
        return self.encode_units(current.float() / theta.float(), baseline, steps)

    @final
    def encode_units(self, units: Tensor, baseline: Tensor, steps: Steps = 1) -> Tensor:
        """:meth:`encode` of a current in thresholds, float32; for neurons that keep that method."""
        top = torch.as_tensor(self.top(steps), dtype=torch.float32, device=units.device)
        units = self.worth(units.nan_to_num(0.0, torch.inf, -torch.inf), steps)
        if self.signed:
            size = torch.minimum(half_up(units.abs().clamp(max=_CHARGE_LIMIT)), top)
            return size.copysign_(units).to(torch.int32)
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
        units = self.worth(current.float() / theta, steps)
        if self.signed:
            code = half_up(units.abs()).minimum(top).copysign_(units)
        else:
            code = half_up(units).add_(baseline).clamp_(min=0)
            code = torch.minimum(code, top, out=code).sub_(baseline)
        return code.mul_(theta)

    def levels_of(self, steps: int) -> Levels | None:
        """The table that :meth:`encode` looks T steps up in, by which a kernel may do the same;
        None where it computes codes in another way.
        """
        return None


def keeps(neuron: SoftResetNeuron, *methods: str) -> bool:
    """Whether a neuron has these methods as :class:`SoftResetNeuron` defines them, so that a
    kernel may do the same in their place.
    """
    return all(getattr(type(neuron), one) is getattr(SoftResetNeuron, one) for one in methods)


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


def with_train(neuron: SoftResetNeuron, train: TrainForm, recoding: Recoding) -> SoftResetNeuron:
    """The same neuron with trains of another form."""
    return replace(neuron, centered=train == "centered", recoding=recoding)


def with_price(neuron: SoftResetNeuron, price: float, priced: SpikeForm) -> SoftResetNeuron:
    """The same neuron with a price on its spikes; without one, itself.

    Raises:
        ValueError: the neuron takes none (see :func:`price_misfit`), or the price is not valid.
    """
    if (price := whole_price(price)) == 0:
        return neuron
    if reason := price_misfit(neuron):
        raise ValueError(f"a spike cannot have a price: {reason}")
    return replace(neuron, price=price, priced=priced)


def price_misfit(neuron: SoftResetNeuron) -> str | None:
    """Why spikes of a neuron cannot have a price; None if they can."""
    if not neuron.both_signs:
        return "the train is of the code itself, which fires at rest; set train to centered"
    if not neuron.unrolls:
        return "codes are no trains of spikes; use neuron gif"
    if not keeps(neuron, "encode", "fake_quantize"):
        return "the neuron encodes in a way of its own"
    return None


def unrolling(bits: int) -> list[str]:
    """Names of the neurons that emit spikes of so many bits and unroll their codes in time."""
    found = []
    for name in neurons.names():
        with suppress(ValueError):  # not of so many bits
            if make_neuron(name, bits).unrolls:
                found.append(name)
    return found
