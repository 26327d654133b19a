"""Thresholds that are constants (static quantization): θ and z of every group of channels, from the
calibration inputs alone, so that no minimum or maximum is taken while the model runs.

The range of a group is that of its values on the calibration text, or, where it is searched, that
between two of their percentiles: those with which the errors of the group cost the layers that read
the tensor least, ``E‖(x̂ − x) Wᵀ‖²`` over its own channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spikellm.quantization.thresholds import Threshold, at_power_of_two, threshold_for_range
from spikellm.recipe import ActivationRecipe

_TOKENS = 4096  # on which losses are compared
_CLIPPED = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.15)
"""Shares of values beyond an end of the range."""
_PATIENCE = 4  # shares that lose more than the best before no larger one is tried
_MOVES = ((True, True), (False, True), (True, False))  # which ends


def constant_thresholds(
    settings: ActivationRecipe,
    channel_group: Tensor,
    x: Tensor,
    weight: Tensor,
    token_scale: Tensor | None = None,
) -> Threshold:
    """θ and z of every group, float32 ``(groups,)``.

    Args:
        channel_group: uint8 ``(in,)``.
        x: sampled inputs as the layers will be fed them, float32, ``(tokens, in)``.
        weight: of all layers that read them, ``(out, in)``.
        token_scale: what errors of tokens are multiplied by, ``(tokens, 1)``; None for ones.
    """
    ranges = [
        _Range(settings, channel_group, x, place) for place in range(max(settings.group_ranges) + 1)
    ]
    if settings.search_range:
        stride = -(-len(x) // _TOKENS)
        scale = None if token_scale is None else token_scale[::stride]
        for one in ranges:
            _search(one, x[::stride].float(), weight.detach().float().to(x.device), scale)
    pairs = [
        ranges[of].threshold(steps, ranges[of].clipped)
        for of, steps in zip(settings.group_ranges, settings.group_steps, strict=True)
    ]
    return Threshold(*(torch.stack(one) for one in zip(*pairs, strict=True)))


class _Range:
    """A range that channels share.

    Attributes:
        columns: channels in it, group after group.
        clipped: shares of their values below and above it.
    """

    def __init__(
        self, settings: ActivationRecipe, channel_group: Tensor, x: Tensor, place: int
    ) -> None:
        self.symmetric, self._neuron = settings.symmetric, settings.make_neuron()
        self._power_of_two = settings.power_of_two
        groups = [group for group, of in enumerate(settings.group_ranges) if of == place]
        members = [(channel_group == group).nonzero().squeeze(1) for group in groups]
        self._parts = [
            (len(m), settings.group_steps[g]) for g, m in zip(groups, members, strict=True)
        ]
        self.columns, self.clipped = torch.cat(members), (0.0, 0.0)
        self._values = torch.sort(x.index_select(1, self.columns).flatten().float()).values

    def threshold(self, steps: int, clipped: tuple[float, float]) -> Threshold:
        """θ and z, without dimensions, with these shares of values beyond the ends."""
        values, last = self._values, len(self._values) - 1
        low = high = values.new_zeros(())
        if len(values):
            low = values[round(clipped[0] * last)].clamp(max=0.0)
            high = values[last - round(clipped[1] * last)].clamp(min=0.0)
        top, signed = self._neuron.top(steps), self._neuron.signed
        found = threshold_for_range(low, high, top, symmetric=self.symmetric, signed=signed)
        if not self._power_of_two:
            return found
        return at_power_of_two(found, low, top, placed=not (self.symmetric or signed))

    def error(self, x: Tensor, clipped: tuple[float, float]) -> Tensor:
        """Coded values less values of its columns, ``(tokens, columns)``."""
        parts = x.split([count for count, _ in self._parts], 1)
        coded = [
            self._neuron.fake_quantize(part, *self.threshold(steps, clipped), steps)
            for part, (_, steps) in zip(parts, self._parts, strict=True)
        ]
        return torch.cat(coded, 1) - x


def _search(one: _Range, x: Tensor, weight: Tensor, token_scale: Tensor | None) -> None:
    """Set the shares that a range clips to those that lose least on ``x``, ``(tokens, in)``."""
    own, part = weight.index_select(1, one.columns), x.index_select(1, one.columns)
    energy = own.T @ own

    def loss(clipped: tuple[float, float]) -> float:
        error = one.error(part, clipped)
        error = error if token_scale is None else error * token_scale
        return float(((error @ energy) * error).sum(dtype=torch.float64))

    one.clipped = _least(loss, symmetric=one.symmetric)


def _least(loss: Callable[[tuple[float, float]], float], *, symmetric: bool) -> tuple[float, float]:
    """The shares below and above a range that lose least: of equal ones, then of those with another
    at either end. Less clipping means coarser codes: the loss falls, then rises.
    """
    best, least = (0.0, 0.0), float("inf")
    for low_moves, high_moves in ((True, True),) if symmetric else _MOVES:
        worse, start = 0, best
        for share in _CLIPPED:
            tried = share if low_moves else start[0], share if high_moves else start[1]
            if (lost := loss(tried)) < least:
                best, least, worse = tried, lost, 0
            elif (worse := worse + 1) > _PATIENCE:
                break
    return best
