"""How the columns of a spiking layer are stored: sorted into groups that share thresholds and
steps, and cut into segments.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.spec import Segment
from spikellm.quantization.affine import column_groups
from spikellm.recipe import LinearRecipe


class Layout(NamedTuple):
    """Where stored columns come from: ``order[i]`` is the channel of stored column i.

    None if nothing moved.
    """

    order: Tensor | None
    bounds: list[int]  # activation group a holds stored columns bounds[a] … bounds[a+1]
    steps: list[int]  # of each activation group
    ranges: list[tuple[int, int]]  # stored columns that share the range of activation group a
    weight_groups: list[tuple[int, int]]  # stored columns of each weight group
    weight_steps: list[int]  # of each weight group
    segments: list[Segment]


def make_layout(
    channel_group: Tensor, column_steps: Tensor | None, settings: LinearRecipe
) -> Layout:
    """Sort columns by activation group, then by steps of their weights, and cut them where either
    kind of group ends.

    Args:
        channel_group: activation group of every channel, ``(in,)``.
        column_steps: steps T of the weights of every column, ``(in,)``; None where all take one.
            Columns of equal steps share a scale in each row.
    """
    columns, group_ranges = channel_group.shape[0], settings.activations.group_ranges
    classes = 1 if column_steps is None else int(column_steps.max()) + 1
    key = channel_group.long() * classes + (0 if column_steps is None else column_steps.long())
    counts = torch.bincount(key, minlength=classes * len(group_ranges)).tolist()
    ends = [0, *accumulate(counts)]
    bounds = ends[::classes]
    order = torch.sort(key, stable=True).indices if sum(count > 0 for count in counts) > 1 else None
    members = [[a for a, r in enumerate(group_ranges) if r == of] for of in group_ranges]
    ranges = [(bounds[groups[0]], bounds[groups[-1] + 1]) for groups in members]
    if column_steps is not None:
        sections = set(ends)
    elif settings.activations.clusters > 1:  # scales of their own would cost more than codes
        sections = {columns}
    else:
        sections = {stop for _, stop in ranges}
    weight_groups = column_groups(sorted(sections - {0}), settings.weights.group_size)
    weight_steps = [
        1 if column_steps is None else bisect_right(ends, start) - 1 for start, _ in weight_groups
    ]
    if column_steps is not None:
        weight_steps = [section % classes for section in weight_steps]
    segments = []
    for start, stop in pairwise(
        sorted({0, columns, *bounds, *(stop for _, stop in weight_groups)})
    ):
        group = next(a for a in range(len(group_ranges)) if bounds[a] <= start < bounds[a + 1])
        owner = next(w for w, (first, last) in enumerate(weight_groups) if first <= start < last)
        segments.append(Segment(start, stop, group, owner))
    return Layout(
        order,
        bounds,
        list(settings.activations.group_steps),
        ranges,
        weight_groups,
        weight_steps,
        segments,
    )


def most_weight_groups(columns: int, settings: LinearRecipe, classes: int = 1) -> int:
    """Weight groups that a layout can have at most, where columns have ``classes`` different
    numbers of steps.
    """
    ranges = settings.activations.group_ranges
    one = settings.activations.clusters > 1
    sections = classes * len(ranges) if classes > 1 else 1 if one else len(set(ranges))
    return len(column_groups(columns, settings.weights.group_size)) + sections - 1
