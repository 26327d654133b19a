"""How the columns of a spiking layer are stored: sorted into groups that share thresholds and steps, and cut into segments."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.quantization.affine import column_groups
from spikellm.recipe import LinearRecipe


class Segment(NamedTuple):
    """Columns ``start … stop`` (in stored order) with one activation group and one weight group."""

    start: int
    stop: int
    activation_group: int
    weight_group: int


class Layout(NamedTuple):
    """Where stored columns come from: ``order[i]`` is the channel of stored column i; None if nothing moved."""

    order: Tensor | None
    bounds: list[int]  # activation group a holds stored columns bounds[a] … bounds[a+1]
    steps: list[int]  # of each activation group
    ranges: list[tuple[int, int]]  # stored columns that share the range of activation group a
    weight_groups: list[tuple[int, int]]  # stored columns of each weight group
    weight_steps: list[int]  # of each weight group
    segments: list[Segment]


def make_layout(channel_group: Tensor, weight_group: Tensor | None, settings: LinearRecipe) -> Layout:
    """Sort columns by activation group, then by steps of their weights, and cut them where either kind of group ends.

    Args:
        channel_group: activation group of every channel, ``(in,)``.
        weight_group: 1 where the weights of a channel take ``salient_steps``, ``(in,)``; None where all take one.
    """
    columns, group_ranges = channel_group.shape[0], settings.activations.group_ranges
    key = channel_group.long() * 2 + (0 if weight_group is None else weight_group.long())
    counts = torch.bincount(key, minlength=2 * len(group_ranges)).tolist()
    ends = [0, *accumulate(counts)]
    bounds = ends[::2]
    order = torch.sort(key, stable=True).indices if sum(count > 0 for count in counts) > 1 else None
    members = [[a for a, r in enumerate(group_ranges) if r == of] for of in group_ranges]
    ranges = [(bounds[groups[0]], bounds[groups[-1] + 1]) for groups in members]
    sections = {stop for _, stop in ranges} if weight_group is None else set(ends)
    weight_groups = column_groups(sorted(sections - {0}), settings.weights.group_size)
    fine = [(ends[i], ends[i + 1]) for i in range(1, len(counts), 2)]
    weight_steps = [settings.weights.salient_steps if any(a <= start < b for a, b in fine) else 1 for start, _ in weight_groups]
    segments = []
    for start, stop in pairwise(sorted({0, columns, *bounds, *(stop for _, stop in weight_groups)})):
        group = next(a for a in range(len(group_ranges)) if bounds[a] <= start < bounds[a + 1])
        owner = next(w for w, (first, last) in enumerate(weight_groups) if first <= start < last)
        segments.append(Segment(start, stop, group, owner))
    return Layout(order, bounds, list(settings.activations.group_steps), ranges, weight_groups, weight_steps, segments)


def most_weight_groups(columns: int, settings: LinearRecipe) -> int:
    """Weight groups that a layout can have at most."""
    ranges = settings.activations.group_ranges
    sections = 2 * len(ranges) if settings.weights.salient_rate else len(set(ranges))
    return len(column_groups(columns, settings.weights.group_size)) + sections - 1
