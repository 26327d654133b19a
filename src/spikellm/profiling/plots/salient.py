"""The salient channels of every input, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikellm.profiling.plots.canvas import SERIES, axes, inline_svg
from spikellm.profiling.plots.grid import place_of
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.report import Report

_PANELS = 6  # inputs whose channels are drawn
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
    with axes(height=0.7 + 1.15 * len(panels), nrows=len(panels), squeeze=False) as (figure, grid):
        for axis, (name, marks) in zip(grid[:, 0], panels.items(), strict=True):
            _draw_panel(axis, name, marks)
        grid[-1, 0].set_xlabel("channel")
        handles = _legend(grid[0, 0], list(panels.values()))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8)
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


def _draw_panel(axis: Any, name: str, marks: Marks) -> None:
    for kind, color, _ in _KINDS:
        x: list[int] = []
        y: list[int] = []
        for block, kinds in marks.items():
            found = (kinds == kind).nonzero().flatten().tolist()
            x += found
            y += [block] * len(found)
        if x:
            axis.scatter(x, y, marker="|", s=22, linewidths=0.9, color=color)
    axis.set_xlim(-1, next(iter(marks.values())).numel())
    axis.set_ylim(max(marks) + 0.7, -0.7)
    axis.set_title(name, fontsize=8, loc="left")
    axis.set_ylabel("block")


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
