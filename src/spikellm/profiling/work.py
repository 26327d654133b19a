"""What a model does beside products of matrices, as elementary operations: rows of an estimate that
can each be switched off.

Numbers that are not coded count as numbers of 16 bits, whatever type they are computed in.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from spikellm.neurons import SoftResetNeuron
from spikellm.profiling.counts import Firing
from spikellm.profiling.elementary import Work
from spikellm.quantization.thresholds import ThresholdSource

ROWS: dict[str, str] = {
    "coding": "coding: ranges, thresholds, rounding",
    "firing": "neurons that unroll codes into spikes",
    "scaling": "scaling of sums",
    "norms": "norms",
    "softmax": "softmax",
    "rotary": "rotary embedding",
    "routing": "routing of spikes",
    "memory": "reading weights on the chip",
}
"""Rows by name, in words."""


class Coder(NamedTuple):
    """How values are coded.

    Attributes:
        ranges: thresholds of a token.
        baseline: whether codes start from a baseline.
        placed: whether the baseline lies where the range asks for it; otherwise in the middle.
        shared: whether only a share of the range is coded.
        centered: whether trains are of what is above the baseline. Otherwise sums hold the
            baseline's charge, which is taken off; those of merged codes always do.
        by_mean: whether thresholds follow the mean magnitude, not the range.
        fixed: whether thresholds are constants, so that nothing is done to find them.
    """

    ranges: int
    baseline: bool
    placed: bool
    shared: bool = False
    centered: bool = False
    by_mean: bool = False
    fixed: bool = False

    def charges(self, mode: str) -> bool:
        """Whether sums of an execution mode hold the baseline's charge."""
        return self.baseline and (mode == "merged" or not self.centered)


def coder_of(
    neuron: SoftResetNeuron,
    ranges: int,
    *,
    symmetric: bool,
    shared: bool = False,
    source: ThresholdSource = "range",
) -> Coder:
    """How a neuron codes."""
    placed, by_mean, fixed = (
        not (symmetric or neuron.signed),
        source == "mean",
        source == "calibration",
    )
    return Coder(ranges, not neuron.signed, placed, shared, neuron.centered, by_mean, fixed)


@lru_cache(maxsize=256)  # many layers are alike; what is given is not written into
def work_of_coding(values: int, thresholds: int, coder: Coder) -> Work:
    """Coding of values by so many thresholds (see :mod:`spikellm.quantization.thresholds`).

    A value is compared with both ends of the range, multiplied by 1/θ, rounded, moved by the
    baseline, and held within the codes (two comparisons). A threshold takes two comparisons with
    zero, the ends times 1/T·L and their sum, and 1/θ; its baseline a product, a rounding and a
    comparison. A symmetric one takes a comparison and a product instead of the sum.

    For a mean, the magnitude of a value is added up instead of the two comparisons with the range,
    and a threshold is the sum times one number, in which its share and T·L are. Thresholds that are
    constants take nothing, and no value is compared with the range.
    """
    each = Work(compare=4, multiply=1, round=1, add=int(coder.baseline))
    if coder.fixed:
        each.update({"compare": -2})
        return many(each, values)
    if coder.by_mean:
        each.update({"compare": -2, "add": 1})
        return many(each, values) + many(Work(multiply=1, divide=1), thresholds)
    one = Work(compare=3, multiply=1, divide=1)
    if coder.placed:
        one.update(multiply=2, add=1, round=1)
    if coder.shared:
        one.update(multiply=2)
    return many(each, values) + many(one, thresholds)


def work_of_firing(mode: str, firing: Firing, levels: int) -> Work:
    """Neurons that fire a train: each looks at its membrane once a moment.

    A code is one number in merged execution, so nothing is unrolled; T moments in stepped, T·L in
    binary execution. In phase execution there are as many as L has bits, and one for each further
    step: exact for two, one or more too many from four.
    """
    moments = {
        "merged": 0,
        "stepped": firing.slots,
        "binary": firing.slots * levels,
        "phase": firing.codes * (levels.bit_length() - 1) + firing.slots,
    }[mode]
    fired = min(firing.spikes[mode], moments)
    return +Work(update=fired, idle=moments - fired)


@lru_cache(maxsize=256)
def work_of_scaling(outputs: int, segments: int, *, baseline: bool, coded: bool = True) -> Work:
    """Scaling of integer sums: θ and the scale of the weights for each segment, and the baseline's
    charge taken off; where inputs are not coded, the scale of the weights alone.
    """
    one = Work(multiply=(1 + int(coded)) * segments, add=segments - 1)
    if baseline:
        one.update(multiply=segments, add=segments)
    return many(+one, outputs)


def work_of_norm(vectors: int, channels: int, *, centered: bool, gain: bool, bias: bool) -> Work:
    """Norms of vectors: squares and their sum, 1/√ of the mean and an epsilon, and products with
    it; where they are centered, a mean and a difference more.
    """
    one = Work(multiply=2 * channels + 1, add=channels, root=1)
    if centered:
        one.update(multiply=1, add=2 * channels - 1)
    one.update(multiply=channels * gain, add=channels * bias)
    return many(one, vectors)


def work_of_softmax(rows: int, keys: int) -> Work:
    """Softmax over rows of scores: each is scaled, compared for the largest, which is taken off,
    and raised; sums, their reciprocals, and products with these.
    """
    each = Work(multiply=2, compare=1, add=2, exp=1)
    return many(each, rows * keys) + Work(divide=rows)


def work_of_rotary(vectors: int, channels: int) -> Work:
    """Rotary embedding of so many channels of each query or key."""
    return Work(multiply=2 * channels * vectors, add=channels * vectors)


def many(work: Work, count: int) -> Work:
    """Work done so many times."""
    return Work({operation: each * count for operation, each in work.items()})
