"""The pictures of a report."""

from __future__ import annotations

from spikellm.profiling.plots.beside import published
from spikellm.profiling.plots.cost import accuracy, energy, error_by_block, sizes
from spikellm.profiling.plots.firing import (
    firing_by_layer,
    firing_distribution,
    raster,
    steps_by_layer,
)
from spikellm.profiling.plots.massive import massive
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.plots.salient import channels
from spikellm.profiling.plots.stored import stored
from spikellm.profiling.plots.training import training
from spikellm.profiling.report import Report

_DRAWN = (
    accuracy,
    stored,
    energy,
    published,
    steps_by_layer,
    channels,
    massive,
    firing_by_layer,
    firing_distribution,
    raster,
    error_by_block,
    training,
    sizes,
)


def pictures(report: Report) -> list[Picture]:
    """All pictures for which a report has data, in the order of the page."""
    found = (draw(report) for draw in _DRAWN)
    return [picture for picture in found if picture]
