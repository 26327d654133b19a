"""Rasters of spikes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spikellm.profiling.plots.canvas import SERIES, label, strokes

_HALVES = -0.42, 0.42  # of a moment: where a mark begins and ends


def draw_raster(
    axis: Any, planes: Tensor, salient: Tensor | None = None, places: Sequence[int] = ()
) -> None:
    """Spikes over time.

    Args:
        planes: {−1, 0, 1}, ``(moments, channels)``.
        salient: bool ``(channels,)``: channels with more steps, or a range of their own, drawn in
            other colours.
        places: of every moment k of what its spikes are worth, 2^k; where all are worth the same,
            none.
    """
    moments, channels = planes.shape
    salient = torch.zeros(channels, dtype=torch.bool) if salient is None else salient
    kinds = [
        ("positive", ~salient, 1, SERIES[0]),
        ("negative", ~salient, -1, SERIES[2]),
        ("salient, positive", salient, 1, SERIES[1]),
        ("salient, negative", salient, -1, SERIES[3]),
    ]
    for words, members, sign, color in kinds:
        time, channel = ((planes == sign) & members).nonzero().unbind(1)
        if len(time):
            middle = time.double() + 1
            tops, ends = (
                torch.stack((channel.double(), middle + half), 1).tolist() for half in _HALVES
            )
            strokes(axis, tops, ends, linewidth=1.1, color=color)
            axis.scatter([], [], marker="s", s=22, color=color, label=words)
    axis.set_xlim(-1, channels)
    axis.set_ylim(moments + 0.7, 0.3)
    axis.grid(visible=False)
    if places:
        told = [f"{moment} ({1 << k})" for moment, k in enumerate(places, start=1)]
        axis.set_yticks(range(1, moments + 1), told)
    label(axis, "channel", "moment (worth of a spike)" if places else "moment")
