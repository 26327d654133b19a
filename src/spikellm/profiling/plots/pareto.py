"""Accuracy against cost, with the Pareto front marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spikellm.profiling.plots.canvas import INK, MUTED, SERIES, axes, label, write_svg

_ACROSS = 4  # panels


class Point(NamedTuple):
    """One setting: costs by name, perplexity and its deviation over seeds, and a short name.

    A cost that it does not have (spikes of a model that has none) is left out.
    """

    costs: dict[str, float]
    perplexity: float
    deviation: float
    name: str


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are not dominated: no other point is as good in both numbers and better in one.

    Equal points are both on the front, or both off it.
    """

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)

    return [not beaten(point) for point in points]


def write_pareto(points: Sequence[Point], original: float, text: str, path: Path) -> None:
    """Draw a panel for each cost: perplexity with error bars, the front, and the original.

    Args:
        original: perplexity of the model that was converted.
        text: name of the text that perplexity was measured on.

    Raises:
        SpikeLLMError: the file system refused.
    """
    costs, fronts = list(dict.fromkeys(cost for point in points for cost in point.costs)), []
    across = min(len(costs), _ACROSS)
    down = -(-len(costs) // across)
    with axes(
        width=7.4 if across < _ACROSS else 9.6,
        height=0.7 + 2.4 * down + 0.13 * len(points),
        nrows=down,
        ncols=across,
        sharey=True,
        squeeze=False,
    ) as (figure, grid):
        for axis in grid.flat[len(costs) :]:
            axis.set_visible(False)
        for place, (axis, cost) in enumerate(zip(grid.flat, costs, strict=False)):
            front = _draw_panel(axis, points, cost)
            fronts.append(f"{cost}: front of {', '.join(point.name for point in front)}")
            axis.axhline(original, color=SERIES[1], linewidth=1, linestyle="--", label="original")
            label(axis, cost, "" if place % across else f"perplexity on {text}")
        key = "\n".join(f"{index}  {point.name}" for index, point in enumerate(points, start=1))
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=2, fontsize=8)
        figure.supxlabel(key, fontsize=7, x=0.02, ha="left", color=INK)
        words = f"{'; '.join(fronts)}; the original has {original:.2f}"
        write_svg(figure, path, f"Perplexity on {text} against cost", words)


def _draw_panel(axis: Any, points: Sequence[Point], cost: str) -> list[Point]:
    """Draw the points that have a cost over it, numbered from 1 over all points; returns those on
    the front.
    """
    having = {number: one for number, one in enumerate(points, start=1) if cost in one.costs}
    on_front = pareto_front([(point.costs[cost], point.perplexity) for point in having.values()])
    for (number, point), best in zip(having.items(), on_front, strict=True):
        place = point.costs[cost], point.perplexity
        axis.errorbar(
            *([value] for value in place),
            yerr=point.deviation or None,
            fmt="o" if best else "x",
            color=SERIES[0] if best else MUTED,
            markersize=5,
            capsize=2.5,
            elinewidth=1,
        )
        axis.annotate(
            str(number),
            place,
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7,
            color=INK,
        )
    front = [point for point, best in zip(having.values(), on_front, strict=True) if best]
    x, y = zip(*sorted((point.costs[cost], point.perplexity) for point in front), strict=True)
    axis.plot(x, y, color=SERIES[0], linewidth=1, zorder=1, label="Pareto front")
    axis.margins(0.12)
    return front
