"""What is counted of forward passes: multiply-accumulates by operand bits, spikes and synaptic
operations, by layer. See :mod:`spikellm.profiling.operations`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

from torch import Tensor

from spikellm.kernels.spec import ExecutionMode
from spikellm.profiling.elementary import Work

DENSE_BITS = 16  # of an operand that is not coded, whatever type it is computed in
EXECUTION_MODES: tuple[str, ...] = get_args(ExecutionMode)
DENSE = "dense"  # the original at 16 bits, beside the execution modes


class Firing(NamedTuple):
    """Spikes of one population, summed over tokens.

    Attributes:
        codes: how many codes.
        slots: steps of all of them, ``Σ T``.
        spikes: non-zero spikes by execution mode.
        rates: of every channel, binary spikes over the most it could fire, float32 ``(channels,)``,
            in stored order; of attention's probabilities, whose last dimension are keys, of all
            together, ``(1,)``.
        from_zero: spikes by execution mode if the train were that of the code itself, as published.
    """

    codes: int
    slots: int
    spikes: dict[str, int]
    rates: Tensor
    from_zero: dict[str, int]

    def plus(self, other: Firing) -> Firing:
        """Both together."""
        slots = self.slots + other.slots
        return Firing(
            self.codes + other.codes,
            slots,
            _sum(self.spikes, other.spikes),
            (self.rates * self.slots + other.rates * other.slots) / max(slots, 1),
            _sum(self.from_zero, other.from_zero),
        )


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {mode: count + other[mode] for mode, count in one.items()}


@dataclass
class Operations:
    """Counts of one layer, of a part of attention, or of several of them.

    Attributes:
        macs: multiply-accumulates of the original operation.
        by_bits: multiply-accumulates as executed in steps, by bits of both operands.
        additions: of these, what is an addition or subtraction.
        sops: synaptic operations by execution mode, at weights that are not zero; of what does not
            spike nothing.
        reached: the same with weights of zero: spikes by execution mode times the synapses of
            their neuron.
        operands: numbers that stay in place while others pass by, weights or cached keys and
            values, each once a call: what a product of matrices reads.
        shifts: doublings of accumulators in phase execution, see
            :mod:`spikellm.profiling.shifts`.
        slots, spikes: steps of all neurons, and non-zero spikes by execution mode.
        codes: values that are coded.
        spikes_from_zero, sops_from_zero: spikes and synaptic operations if all trains were those of
            the codes themselves, as published, which fire at rest too.
        extra_steps: steps that a layer counts beyond the multiply-accumulates executed
            (:meth:`spikellm.nn.formats.WeightFormat.average_steps`).
    """

    macs: int = 0
    by_bits: Counter[tuple[int, int]] = field(default_factory=Counter)
    additions: float = 0.0
    sops: Counter[str] = field(default_factory=Counter)
    slots: int = 0
    spikes: Counter[str] = field(default_factory=Counter)
    extra_steps: float = 0.0
    codes: int = 0
    spikes_from_zero: Counter[str] = field(default_factory=Counter)
    sops_from_zero: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    operands: int = 0
    shifts: int = 0

    @property
    def executed(self) -> float:
        """Multiply-accumulates as executed in steps."""
        return sum(self.by_bits.values())

    @property
    def ace(self) -> float:
        """Arithmetic computation effort, bit operations."""
        return sum(count * a * b for (a, b), count in self.by_bits.items())

    @property
    def dense_ace(self) -> int:
        """That of the original at 16 bits."""
        return self.macs * DENSE_BITS**2

    @property
    def average_steps(self) -> float:
        """Steps of an original multiply-accumulate, as layers count them.

        Each step that is executed is one.
        """
        return (self.executed + self.extra_steps) / self.macs if self.macs else 1.0

    @property
    def spike_rate(self) -> float:
        """Non-zero spikes of stepped execution over all steps of all neurons.

        0 where nothing spikes.
        """
        return self.spikes["stepped"] / self.slots if self.slots else 0.0

    @property
    def weight_density(self) -> float:
        """Share of the synapses that spikes of merged execution reach whose weight is not zero.

        1 where nothing spikes.
        """
        return self.sops["merged"] / self.reached["merged"] if self.reached["merged"] else 1.0

    @property
    def sparse_rate(self) -> float:
        """Spike rate times weight density: of all steps of all synapses, those at which a spike
        meets a weight that is not zero.
        """
        reached = self.reached["stepped"]
        return self.spike_rate * self.sops["stepped"] / reached if reached else 0.0

    @property
    def additive_share(self) -> float:
        """Share of the executed multiply-accumulates that are additions or subtractions."""
        return self.additions / self.executed if self.executed else 0.0

    def add(self, other: Operations) -> None:
        """Add the counts of another."""
        self.macs += other.macs
        self.additions += other.additions
        self.slots += other.slots
        self.extra_steps += other.extra_steps
        self.by_bits.update(other.by_bits)
        self.sops.update(other.sops)
        self.reached.update(other.reached)
        self.operands += other.operands
        self.shifts += other.shifts
        self.spikes.update(other.spikes)
        self.codes += other.codes
        self.spikes_from_zero.update(other.spikes_from_zero)
        self.sops_from_zero.update(other.sops_from_zero)


@dataclass
class Counts:
    """Operations of a pass by layer: full names of linear layers, and ``NAME scores`` and ``NAME
    values`` for both products of an attention module.

    Attributes:
        tokens: how many went in.
        kinds: ``linear``, ``attention``, ``head`` (the output projection) or ``rotation`` (before a
            layer, or of Q and K) of every entry.
        firing: of every population, by layer and part (``NAME.input``, ``NAME.query`` …).
        work: what is no product of matrices: elementary operations by row (see
            :mod:`spikellm.profiling.work`) and by execution mode, or :data:`DENSE`.
    """

    tokens: int
    layers: dict[str, Operations] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    firing: dict[str, Firing] = field(default_factory=dict)
    work: dict[str, dict[str, Work]] = field(default_factory=dict)

    def add_work(self, row: str, work: Work, *modes: str) -> None:
        """Add work of these modes, of all execution modes by default."""
        own = self.work.setdefault(row, {})
        for mode in modes or EXECUTION_MODES:
            own.setdefault(mode, Work()).update(work)

    def add(self, other: Counts) -> None:
        """Add the counts of another pass over the same model."""
        self.tokens += other.tokens
        for name, layer in other.layers.items():
            self.layers.setdefault(name, Operations()).add(layer)
        self.kinds.update(other.kinds)
        for name, firing in other.firing.items():
            self.firing[name] = self.firing[name].plus(firing) if name in self.firing else firing
        for row, by_mode in other.work.items():
            for mode, work in by_mode.items():
                self.add_work(row, work, mode)

    def total(self, *kinds: str) -> Operations:
        """Sum over layers of these kinds, over all by default."""
        whole = Operations()
        for name, layer in self.layers.items():
            if not kinds or self.kinds[name] in kinds:
                whole.add(layer)
        return whole
