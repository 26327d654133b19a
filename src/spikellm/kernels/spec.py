"""What kernels are asked to run, as plain data: no layer, no recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from spikellm.neurons import SoftResetNeuron
from spikellm.quantization.massive_tokens import MassiveTokens
from spikellm.quantization.packing import packed_length
from spikellm.quantization.thresholds import FULL_RANGE, ThresholdSource, share_of

_HEADER_BYTES = 3  # of a range in a cached row: θ in two, z in one

ExecutionMode = Literal["merged", "stepped", "binary", "phase"]
"""How spikes are summed: one product of counts, T products, T·L products of {−1, 0, 1}, or one such
product for every power of two, before which sums are doubled.
"""

IntegerForm = Literal["affine", "ternary", "planes", "partly-binary", "none"]
"""``k = code − zero``; trains of T spikes of −1, 0 and 1; a sum of planes of −1, 0 and 1, each with
scales of its own; binary weights and 8-bit ones likewise, so no integers; or nothing that kernels
know of.
"""

WITH_INTEGERS = frozenset[IntegerForm](("affine", "ternary"))
"""Forms that are integers."""

ThresholdMode = Literal["asymmetric", "symmetric", "signed"]
"""Baseline where the range asks for it, in the middle, or none, since spikes have signs."""


class Segment(NamedTuple):
    """Columns ``start … stop`` (in stored order) with one activation group and one weight group."""

    start: int
    stop: int
    activation_group: int
    weight_group: int


def threshold_mode(neuron: SoftResetNeuron, *, symmetric: bool) -> ThresholdMode:
    """How thresholds are found for a neuron."""
    return "signed" if neuron.signed else "symmetric" if symmetric else "asymmetric"


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """A spiking linear layer.

    Attributes:
        columns, rows: inputs and outputs.
        weights: integer form of the weights.
        weight_bits: bits in which every code fits; 0 without an integer form.
        scales: columns of the tensor of weight scales.
        weight_steps: T of each weight group.
        weight_tops: largest code of each weight group.
        neuron: what codes the inputs; None where inputs are not coded.
        symmetric: whether baselines are in the middle.
        steps: T of each activation group.
        bounds: stored columns ``(start, stop)`` of each activation group.
        ranges: stored columns ``(start, stop)`` whose range activation group a takes.
        segments: in stored order.
        order: channel of every stored column, ``(in,)``; None where nothing moved.
        execution: how spikes are summed.
        range_share, threshold_source: see :func:`spikellm.quantization.thresholds.coded_range`.
        massive: tokens that take more steps in every channel; None where all take the same.
        shares: part of its range that each activation group codes, float32 numbers; empty where
            all code ``range_share``.
        fixed: θ and z of each activation group, float32 numbers, where they are constants; empty
            where every token has its own.
        planes: of each weight group, where weights are sums of planes, each with scales of its own
            (see :mod:`spikellm.kernels.planes`); a group's scales stand side by side.
        scale_terms: signed powers of two whose sum every scale is at most; None for any scales.
    """

    columns: int
    rows: int
    weights: IntegerForm
    weight_bits: int
    scales: int
    weight_steps: tuple[int, ...]
    weight_tops: tuple[int, ...]
    neuron: SoftResetNeuron | None
    symmetric: bool
    steps: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    ranges: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]
    order: Tensor | None
    execution: ExecutionMode
    range_share: int = FULL_RANGE
    massive: MassiveTokens | None = None
    shares: tuple[float, ...] = ()
    threshold_source: ThresholdSource = "range"
    fixed: tuple[tuple[float, float], ...] = ()
    planes: tuple[int, ...] = ()
    scale_terms: int | None = None

    def of_plane(self) -> LinearSpec:
        """One plane of the layer: ternary weights of one step."""
        once = (1,) * len(self.weight_steps)
        return replace(
            self,
            weights="ternary",
            weight_bits=2,
            scales=self.scales // self.most_planes,
            weight_steps=once,
            weight_tops=once,
            planes=(),
        )

    @property
    def most_planes(self) -> int:
        """Planes that some column has; 1 where weights are no sum of planes."""
        return max(self.planes, default=1)

    @property
    def has_integers(self) -> bool:
        """Whether weights have an integer form."""
        return self.weights in WITH_INTEGERS

    def share(self, group: int) -> float:
        """What :func:`spikellm.quantization.thresholds.coded_range` takes for an activation group,
        a float32 number.
        """
        if self.shares:
            return self.shares[group]
        return share_of(self.range_share, self.threshold_source)

    @property
    def thresholds(self) -> ThresholdMode | None:
        """How thresholds are found; None where inputs are not coded."""
        neuron = self.neuron
        return None if neuron is None else threshold_mode(neuron, symmetric=self.symmetric)

    @property
    def tops(self) -> list[int]:
        """Largest code of each activation group; nothing where inputs are not coded."""
        neuron = self.neuron
        return [] if neuron is None else [int(neuron.top(steps)) for steps in self.steps]

    @property
    def massive_top(self) -> int:
        """Largest code of a massive token; 0 where there are none."""
        if self.neuron is None or self.massive is None:
            return 0
        return int(self.neuron.top(self.massive.steps))

    def most_steps(self, group: int) -> int:
        """T of an activation group, in the token that takes most."""
        return max(self.steps[group], self.massive.steps if self.massive is not None else 0)


@dataclass(frozen=True, eq=False)
class HeadSpec:
    """A coder of attention heads.

    Tensors are int64 ``(heads, channels)``, of one head where all are alike.

    Attributes:
        neuron: what codes.
        symmetric: whether baselines are in the middle.
        steps, salient_steps: T of ordinary and of salient channels.
        axis: ``"token"``: ranges over the channels of one token; ``"sequence"``: over all tokens of
            a channel.
        ranges: how many ranges a token has.
        range_of: range of every channel.
        channel_steps: T of every channel.
        order: channel at every place of a row, ordinary ones first.
        ordinary: places of ordinary channels.
        uniform: whether all heads have as many of them.
        share, threshold_source: see :func:`spikellm.quantization.thresholds.coded_range`.
    """

    neuron: SoftResetNeuron
    symmetric: bool
    steps: int
    salient_steps: int
    axis: str
    ranges: int
    range_of: Tensor
    channel_steps: Tensor
    order: Tensor
    ordinary: int
    uniform: bool
    share: float = 1.0
    threshold_source: ThresholdSource = "range"

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.order.shape[1]

    @property
    def thresholds(self) -> ThresholdMode:
        """How thresholds are found."""
        return threshold_mode(self.neuron, symmetric=self.symmetric)

    @property
    def top(self) -> int:
        """Largest code of an ordinary channel, where a train reaches it."""
        return self.neuron.levels * self.steps

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of a stored code of an ordinary and of a salient channel."""
        span = (2 if self.neuron.signed else 1) * self.neuron.levels
        ordinary, salient = span * self.steps, span * self.salient_steps
        return ordinary.bit_length(), max(ordinary, salient).bit_length()

    def lengths(self, channels: int) -> list[int]:
        """How many of a head's channels are ordinary and salient."""
        return [self.ordinary, channels - self.ordinary]

    def row_bytes(self, channels: int) -> int:
        """Bytes of one cached token and head: codes, then θ and z of each range."""
        held = zip(self.lengths(channels), self.bits, strict=True)
        return sum(packed_length(n, bits) for n, bits in held) + _HEADER_BYTES * self.ranges


@dataclass(frozen=True)
class MixSpec:
    """A rotation by additions, :func:`spikellm.quantization.hadamard.mix`."""

    channels: int


@dataclass(frozen=True, eq=False)
class RowSpec:
    """Rows of weights that are looked up, as an embedding does; the layer that they are those of
    takes inputs that are not coded.
    """

    weights: LinearSpec


Spec = LinearSpec | HeadSpec | MixSpec | RowSpec
