"""The salient channels of every input, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikellm.profiling.plots.canvas import SERIES, SMALL, axes, inline_svg, legend, strokes
from spikellm.profiling.plots.grid import block_ticks, place_of
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.report import Report

_PANELS = 6  # inputs whose channels are drawn
_ROW, _LEAST, _MOST = 0.035, 0.7, 1.6  # inches: a block, and the rows of a panel
_SEEN = 250  # of the width of a panel, the least that is seen
_KINDS = (
    (1, SERIES[0], "more steps"),
    (2, SERIES[2], "a range of their own"),
    (3, SERIES[1], "both"),
)
Marks = dict[int, Tensor]
"""Kind of every channel (0 for an ordinary one), int ``(channels,)``, by block."""


def channels(report: Report) -> Picture | None:
    """Which channels take more steps or a range of their own, block by block."""
    if not any(
        bool((steps != steps[0]).any()) or bool(report.own_range[name].any())
        for name, steps in report.steps.items()
    ):
        return None
    panels = _group_equal(_marks_by_row(report))
    if not panels:
        return None
    title = "Salient channels of each input"
    words = "; ".join(_describe(name, marks) for name, marks in panels.items())
    blocks = max(max(marks) for marks in panels.values()) + 1
    each = 0.5 + min(max(_LEAST, _ROW * blocks), _MOST)
    with axes(height=0.7 + each * len(panels), nrows=len(panels), squeeze=False) as (figure, grid):
        lines = [
            line
            for axis, (name, marks) in zip(grid[:, 0], panels.items(), strict=True)
            for line in _draw_panel(axis, name, marks)
        ]
        grid[-1, 0].set_xlabel("channel")
        legend(figure, _legend(grid[0, 0], list(panels.values())))
        figure.draw_without_rendering()  # now rows have their height
        for line in lines:
            top, bottom = line.axes.transData.transform([(0, 0), (0, 1)])[:, 1]
            high = abs(float(bottom - top))
            line.set_linewidth(0.9 * high * 72 / figure.dpi)
        svg = inline_svg(figure, "channels", title, words)
    return Picture(
        "channels",
        title,
        words,
        svg,
        "A mark is a channel that the recipe found salient. Columns of marks are channels that"
        " stand out in block after block.",
    )


def _marks_by_row(report: Report) -> dict[str, Marks]:
    """Marks of every kind of layer; experts, which are numbered, are left out."""
    rows: dict[str, Marks] = {}
    for name, steps in report.steps.items():
        place = place_of(name)
        if place and "*" not in place.row:
            finer = (steps > steps.min()).int()
            rows.setdefault(place.row, {})[place.block] = finer + 2 * report.own_range[name].int()
    return rows


def _group_equal(rows: dict[str, Marks]) -> dict[str, Marks]:
    """One panel for all rows with the same marks, which layers with a shared input have; the first
    few panels, under the names of their rows.
    """
    groups: list[list[str]] = []
    for row, marks in rows.items():
        for group in groups:
            if _equal(rows[group[0]], marks):
                group.append(row)
                break
        else:
            groups.append([row])
    return {" = ".join(group): rows[group[0]] for group in groups[:_PANELS]}


def _equal(first: Marks, second: Marks) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[block], second[block]) for block in first
    )


def _describe(name: str, marks: Marks) -> str:
    salient = sum(int((kinds > 0).sum()) for kinds in marks.values())
    whole = sum(kinds.numel() for kinds in marks.values())
    return f"{name}: {salient} of {whole} channels of all blocks"


def _draw_panel(axis: Any, name: str, marks: Marks) -> list[Any]:
    """A row a block, in which channels of one kind that follow each other are one stroke."""
    channels = next(iter(marks.values())).numel()
    lines = []
    for kind, color, _ in _KINDS:
        starts: list[tuple[float, float]] = []
        ends: list[tuple[float, float]] = []
        for block, kinds in marks.items():
            for first, behind in _runs(kinds == kind):
                # Where marks are few, none is too thin to be seen.
                least = channels / _SEEN if bool((kinds == 0).sum() > channels / 2) else 0.0
                wider = max(0.0, least - (behind - first)) / 2
                starts.append((first - 0.5 - wider, block))
                ends.append((behind - 0.5 + wider, block))
        if starts:
            lines.append(strokes(axis, starts, ends, color=color))
    axis.set_xlim(-1, channels)
    axis.set_ylim(max(marks) + 0.7, -0.7)
    axis.set_yticks(block_ticks(max(marks) + 1))
    axis.set_title(name, fontsize=SMALL, loc="left")
    axis.set_ylabel("block")
    return lines


def _runs(chosen: Tensor) -> list[tuple[int, int]]:
    """First channel of every run of chosen ones, and the one behind its last."""
    edges = torch.diff(chosen.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()
    first, behind = edges.view(-1, 2).unbind(1)
    return list(zip(first.tolist(), behind.tolist(), strict=True))


def _legend(axis: Any, panels: list[Marks]) -> list[Any]:
    present: set[int] = set()
    for marks in panels:
        for kinds in marks.values():
            present.update(kinds.unique().tolist())
    handles = []
    for kind, color, words in _KINDS:
        if kind in present:
            handles.append(axis.scatter([], [], marker="s", s=22, color=color, label=words))
    return handles
