"""Layers of all decoder blocks as a grid: a column a block, a row a kind of layer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from html import escape
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikellm.profiling.plots.canvas import HEAT, INK, SMALL

_BLOCK = re.compile(r"^(?P<before>.*?)\.(?P<block>\d+)\.(?P<layer>.+)$")
_WRITTEN = 8  # columns that leave room for numbers in the cells
_NUMBERED = 8  # numbers of blocks at an axis, at most


class Place(NamedTuple):
    """Place of a layer in the grid: index of its block, and its name within the block, with ``*``
    for the numbers of experts.
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
    """One value for every kind of layer and block.

    Attributes:
        rows: kinds of layers, in the order of the model.
        values: float64 ``(rows, blocks)``, NaN where a block has no such layer.
    """

    rows: list[str]
    values: Tensor

    def words(self) -> str:
        """The grid in words: smallest, largest and mean value of every row."""
        lines = []
        for row, values in zip(self.rows, self.values, strict=True):
            known = values[~values.isnan()]
            lines.append(
                f"{row}: {float(known.min()):.3g} to {float(known.max()):.3g}, mean"
                f" {float(known.mean()):.3g}"
            )
        return "; ".join(lines)


def make_grid(values: Mapping[str, float]) -> Grid:
    """Grid of one value for each layer, by full name; layers in the same cell are averaged."""
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


class Scale(NamedTuple):
    """What the colours of a grid stand for.

    Attributes:
        measure: name of the values.
        low, high: ends of the colour map; those of the values by default.
    """

    measure: str
    low: float | None = None
    high: float | None = None


def draw_grid(figure: Any, axis: Any, grid: Grid, scale: Scale) -> None:
    """Draw a grid in colours, with the numbers in the cells where they fit."""
    cells, blocks = grid.values.numpy(), grid.values.shape[1]
    shown = axis.imshow(
        cells, aspect="auto", cmap=HEAT, vmin=scale.low, vmax=scale.high, interpolation="nearest"
    )
    axis.grid(visible=False)
    axis.set_yticks(range(len(grid.rows)), grid.rows)
    axis.set_xticks(block_ticks(blocks))
    axis.set_xlabel("block")
    if blocks <= _WRITTEN:
        _write_numbers(axis, grid, *shown.get_clim())
    bar = figure.colorbar(shown, ax=axis, orientation="horizontal", shrink=0.7, pad=0.02, aspect=40)
    bar.set_label(scale.measure, color=INK)
    bar.outline.set_visible(False)


def cell_words(axis: Any, grid: Grid, targets: Mapping[Place, str]) -> str:
    """SVG to lie over a drawn grid: the words of each cell, to be seen when it is pointed at, and
    links to where in the page a layer is shown.

    Args:
        axis: with the grid, after it was laid out.
        targets: places in the page by place in the grid.
    """
    width, height = (72 * inches for inches in axis.figure.get_size_inches())
    box = axis.get_position()
    rows, blocks = grid.values.shape
    wide, high = box.width * width / blocks, box.height * height / rows
    found = []
    for row, values in enumerate(grid.values.tolist()):
        for block, value in enumerate(values):
            if math.isnan(value):
                continue
            left, top = box.x0 * width + block * wide, (1 - box.y1) * height + row * high
            target = targets.get(Place(block, grid.rows[row]))
            link = f' href="#{target}" tabindex="-1"' if target else ""
            words = escape(f"{grid.rows[row]}, block {block}: {value:.3g}")
            found.append(
                f"<a{link}><title>{words}</title><rect"
                f' x="{left:.2f}" y="{top:.2f}" width="{wide:.2f}" height="{high:.2f}"'
                ' fill="none" pointer-events="all"/></a>'
            )
    return "".join(found)


def block_ticks(blocks: int) -> range:
    """Blocks whose numbers stand at an axis, with room between them."""
    strides = (step * 10**power for power in count() for step in (1, 2, 5))
    stride = next(stride for stride in strides if blocks <= _NUMBERED * stride)
    return range(0, blocks, stride)


def _write_numbers(axis: Any, grid: Grid, floor: float, ceiling: float) -> None:
    for row, values in enumerate(grid.values.tolist()):
        for column, value in enumerate(values):
            if math.isnan(value):  # an empty cell
                continue
            bright = (value - floor) / max(ceiling - floor, 1e-12) > 0.5
            axis.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=SMALL,
                color="#111111" if bright else "#ffffff",
            )
