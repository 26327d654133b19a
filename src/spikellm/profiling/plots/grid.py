"""Layers of all decoder blocks as a grid: a column a block, a row a kind of layer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikellm.profiling.plots.canvas import HEAT, INK

_BLOCK = re.compile(r"^(?P<before>.*?)\.(?P<block>\d+)\.(?P<layer>.+)$")
_WRITTEN = 12  # columns that leave room for numbers in the cells


class Place(NamedTuple):
    """Where a layer stands: index of its block, and its name within it.

    Numbered parts of the name (experts) are one row.
    """

    block: int
    row: str


def place_of(name: str) -> Place | None:
    """Place of a layer by its full name; None outside the blocks."""
    found = _BLOCK.match(name)
    return (
        Place(int(found["block"]), re.sub(r"(?<=\.)\d+(?=\.)", "*", found["layer"]))
        if found
        else None
    )


class Grid(NamedTuple):
    """Values ``(rows, blocks)``, float64, NaN where there is none.

    Names of the rows in the order in which layers came.
    """

    rows: list[str]
    values: Tensor

    def words(self, unit: str = "") -> str:
        """A line for each row, for those who do not see the grid."""
        lines = []
        for row, values in zip(self.rows, self.values, strict=True):
            known = values[~values.isnan()]
            lines.append(
                f"{row}: {float(known.min()):.3g} to {float(known.max()):.3g}{unit}, mean"
                f" {float(known.mean()):.3g}{unit}"
            )
        return "; ".join(lines)


def make_grid(values: Mapping[str, float]) -> Grid:
    """Grid of one value a layer, by full name; of layers in one cell the mean."""
    cells: dict[Place, list[float]] = defaultdict(list)
    for name, value in values.items():
        if place := place_of(name):
            cells[place].append(value)
    rows = list(dict.fromkeys(place.row for place in cells))
    grid = torch.full(
        (len(rows), max((place.block for place in cells), default=-1) + 1),
        torch.nan,
        dtype=torch.float64,
    )
    for place, found in cells.items():
        grid[rows.index(place.row), place.block] = sum(found) / len(found)
    return Grid(rows, grid)


def draw_grid(
    figure: Any,
    axis: Any,
    grid: Grid,
    measure: str,
    low: float | None = None,
    high: float | None = None,
    digits: int = 2,
) -> None:
    """Colours with a scale; numbers in the cells where they fit."""
    shown = axis.imshow(
        grid.values.numpy(), aspect="auto", cmap=HEAT, vmin=low, vmax=high, interpolation="nearest"
    )
    axis.grid(visible=False)
    axis.set_yticks(range(len(grid.rows)), grid.rows)
    blocks = grid.values.shape[1]
    axis.set_xticks(range(0, blocks, max(1, blocks // 16)))
    axis.set_xlabel("block")
    if blocks <= _WRITTEN:
        floor, ceiling = shown.get_clim()
        for row, values in enumerate(grid.values.tolist()):
            for column, value in enumerate(values):
                if not math.isnan(value):  # of an empty cell
                    bright = (value - floor) / max(ceiling - floor, 1e-12) > 0.5
                    axis.text(
                        column,
                        row,
                        f"{value:.{digits}f}",
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="#111111" if bright else "#ffffff",
                    )
    bar = figure.colorbar(shown, ax=axis, orientation="horizontal", shrink=0.7, pad=0.02, aspect=40)
    bar.set_label(measure, color=INK)
    bar.outline.set_visible(False)
