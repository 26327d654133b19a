"""Thresholds of spiking activations: one firing threshold θ and one baseline z for each token and
channel group, computed while the model runs.

Values are ``x ≈ θ·(q − z)`` with codes ``q`` in ``[0, top]``, or ``[−top, top]`` for a signed
neuron. The range of a group always includes zero, so that ``0 ≤ z ≤ top`` and zero current is coded
without error. Special tokens:

- all zero (or so small that θ would underflow): θ = 1 and every code is the baseline, so the value
  is exactly 0;
- constant: coded exactly up to the rounding of θ, since the range then ends at the constant;
- with NaN or infinity: θ = NaN, so the output of the layer is NaN as it would be without spikes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spikellm.quantization.rounding import half_up


class Threshold(NamedTuple):
    """θ and z of every token, both float32; z holds integers.

    Shapes as the range they were made from.
    """

    theta: Tensor
    baseline: Tensor


def token_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each token, zero included.

    Args:
        x: float32, ``(..., channels)``.

    Returns:
        ``(low, high)``, each ``(..., 1)``, ``low ≤ 0 ≤ high``; NaN where the token holds a NaN. No
        channel at all gives ``(0, 0)``.
    """
    if x.shape[-1] == 0:
        zero = x.new_zeros(*x.shape[:-1], 1)
        return zero, zero
    # Many times faster than aminmax.
    return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)


FULL_RANGE = 64
MOST_SHARE = 4.0
"""A larger part of a range is never coded."""
MEAN_UNIT = 16
MOST_FACTOR = 64.0
"""A token is never coded up to a larger multiple of its mean magnitude."""
_WHOLE = 2.0**24  # parts of the largest magnitude in which others are added up

ThresholdSource = Literal["range", "mean", "calibration"]
"""What sets thresholds: of a token its smallest and largest value, or its mean magnitude; or the
calibration text, for all tokens alike.
"""


def share_of(count: int, source: ThresholdSource) -> float:
    """What :func:`coded_range` takes for a number of 64ths of a range, or of 16ths of a mean."""
    return count / (MEAN_UNIT if source == "mean" else FULL_RANGE)


def part_of_range(low: Tensor, high: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """The part of a range that is coded; ``share`` is a float32 number, conversions write 64ths.

    What lies beyond takes the last code. A rotated token is about normal, and its few largest
    values stretch the range more than they are worth.
    """
    return (low, high) if share == 1 else (low * share, high * share)


def token_mean(x: Tensor, channels: Tensor | int | None = None) -> Tensor:
    """Mean magnitude of each token, ``(..., channels)`` float32 gives ``(..., 1)``; NaN where the
    token is not finite.

    Magnitudes are added up as whole numbers of 2^-24 of the largest, so that the sum is the same in
    whatever order it is taken.

    Args:
        channels: how many to divide by, where others of ``x`` were set to zero; all by default.
    """
    if x.shape[-1] == 0:
        return x.new_zeros(*x.shape[:-1], 1)
    sizes = x.abs()
    largest = sizes.amax(-1, keepdim=True)
    parts = (sizes / largest).nan_to_num(0.0).mul_(_WHOLE).to(torch.int32)
    total = parts.sum(-1, keepdim=True, dtype=torch.int64).double()
    count = x.shape[-1] if channels is None else channels
    if not isinstance(count, Tensor):  # see threshold_for_range
        count = total.new_full((), count)
    return (largest.double() * (total / _WHOLE / count)).float()


def coded_range(
    x: Tensor,
    share: float = 1.0,
    source: ThresholdSource = "range",
    channels: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """The range in which each token is coded.

    Args:
        x: float32, ``(..., channels)``.
        share: how much of the range, see :func:`part_of_range`; or how many times the mean
            magnitude it reaches to both sides.
        channels: see :func:`token_mean`.

    Returns:
        ``(low, high)``, each ``(..., 1)``.
    """
    if source != "mean":
        return part_of_range(*token_range(x), share)
    reach = (token_mean(x, channels) * share).clamp(max=torch.finfo(torch.float32).max)
    return -reach, reach


def threshold_for_range(
    low: Tensor, high: Tensor, top: Tensor | int, *, symmetric: bool = False, signed: bool = False
) -> Threshold:
    """Threshold and baseline with which codes up to ``top`` cover a range.

    Args:
        low, high: ends of the range, ``low ≤ 0 ≤ high``, float32, any shape.
        top: largest code, T·L; one number, or one for each channel.
        symmetric: put the baseline in the middle (``top // 2``) instead of where zero lies in the
            range; needs ``top ≥ 2``.
        signed: the neuron fires negative spikes itself, so the baseline is 0 and the range is
            symmetric.

    Returns:
        ``Threshold(theta, baseline)`` of the shape of ``low``, broadcast to ``top``.
    """
    if not isinstance(top, Tensor):  # divided by a number, CUDA multiplies by its reciprocal
        top = low.new_full((), top)
    if signed or symmetric:
        reach = torch.maximum(high, -low)
        middle = 0 if signed else top // 2
        theta = reach / (top if signed else middle)
        baseline = torch.zeros_like(theta) + middle
    else:
        theta = high / top - low / top  # not (high - low) / top: the difference may overflow
        baseline = torch.minimum(
            half_up(-low / theta).nan_to_num(0.0, 0.0, 0.0),
            top.to(theta.dtype),
        )
    theta = torch.where(theta < torch.finfo(torch.float32).tiny, 1.0, theta)
    return Threshold(theta.masked_fill(~torch.isfinite(theta), float("nan")), baseline)


def held(threshold: Threshold, x: Tensor) -> Threshold:
    """Thresholds that are constants, as those of every token: θ is NaN where the token is not
    finite, so that the output is too. Nothing else of the token is looked at.

    Args:
        threshold: of every group, ``(groups,)``.
        x: float32, ``(..., channels)``.

    Returns:
        θ and z, each ``(..., groups)``.
    """
    finite = (x - x == 0).all(-1, keepdim=True)
    theta = torch.where(finite, threshold.theta, float("nan"))
    return Threshold(theta, threshold.baseline.expand_as(theta))


def at_power_of_two(
    threshold: Threshold, low: Tensor, top: Tensor | int, *, placed: bool
) -> Threshold:
    """The same range with the power of two next to its θ, so that a current in thresholds, and a
    sum of spikes in values, is a shift away.

    Args:
        threshold: as :func:`threshold_for_range` gives it, of normal numbers.
        low: lower end of the range, at most 0.
        top: largest code.
        placed: whether the range places the baseline; otherwise it stays.
    """
    mantissa, exponent = torch.frexp(threshold.theta)
    theta = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa < 0.5**0.5).int())
    if not placed:
        return Threshold(theta, threshold.baseline)
    return Threshold(theta, half_up(-low / theta).minimum(torch.as_tensor(top).to(theta)))
