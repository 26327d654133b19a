"""What others published, as marks of a scatter plot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

from spikellm.profiling.plots.canvas import MUTED, SERIES
from spikellm.profiling.published import PUBLISHED, Published

_MARKERS = "osvPX^<>"


def mark_published(axis: Any, place: Callable[[Published], float]) -> None:
    """Draw every published system at a place of its own, at the ratio that it reports."""
    for one, marker in zip(PUBLISHED, cycle(_MARKERS), strict=False):
        axis.scatter(
            [place(one)],
            [one.ratio],
            s=40,
            marker=marker,
            facecolors="none",
            edgecolors=SERIES[1] if one.spikes else MUTED,
            linewidths=1.3,
            label=f"{one.system} {one.setting}",
        )
