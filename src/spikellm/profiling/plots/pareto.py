"""Accuracy against cost, with the Pareto front marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spikellm.profiling.plots.canvas import INK, MUTED, SERIES, axes, label, write_svg


class Point(NamedTuple):
    """One setting: costs by name, perplexity with its deviation over seeds, and a word or two."""

    costs: dict[str, float]
    perplexity: float
    deviation: float
    name: str


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other point beats: none is at most as large in both numbers and smaller in
    one. Equal points stand or fall together.
    """

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)

    return [not beaten(point) for point in points]


def write_pareto(points: Sequence[Point], original: float, text: str, path: Path) -> None:
    """A panel a cost: perplexity with error bars, front drawn through, original as a line.

    Raises:
        SpikeLLMError: the file system refused.
    """
    costs = list(points[0].costs)
    told = []
    with axes(
        width=7.4, height=3.1 + 0.13 * len(points), ncols=len(costs), sharey=True, squeeze=False
    ) as (figure, grid):
        for place, (axis, cost) in enumerate(zip(grid[0], costs, strict=True)):
            on_front = pareto_front([(point.costs[cost], point.perplexity) for point in points])
            for index, (point, best) in enumerate(zip(points, on_front, strict=True)):
                color = SERIES[0] if best else MUTED
                axis.errorbar(
                    [point.costs[cost]],
                    [point.perplexity],
                    yerr=point.deviation or None,
                    fmt="o" if best else "x",
                    color=color,
                    markersize=5,
                    capsize=2.5,
                    elinewidth=1,
                )
                axis.annotate(
                    str(index + 1),
                    (point.costs[cost], point.perplexity),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=7,
                    color=INK,
                )
            line = sorted(
                (point.costs[cost], point.perplexity)
                for point, best in zip(points, on_front, strict=True)
                if best
            )
            axis.plot(
                *zip(*line, strict=True),
                color=SERIES[0],
                linewidth=1,
                zorder=1,
                label="Pareto front" if place == 0 else None,
            )
            axis.axhline(
                original,
                color=SERIES[1],
                linewidth=1,
                linestyle="--",
                label="original" if place == 0 else None,
            )
            axis.margins(0.12)
            label(axis, cost, f"perplexity on {text}" if place == 0 else "")
            best_names = [point.name for point, best in zip(points, on_front, strict=True) if best]
            told.append(f"{cost}: front of {', '.join(best_names)}")
        key = "\n".join(f"{index + 1}  {point.name}" for index, point in enumerate(points))
        figure.legend(loc="outside upper left", ncols=2, fontsize=8)
        figure.supxlabel(key, fontsize=7, x=0.02, ha="left", color=INK)
        write_svg(
            figure,
            path,
            f"Perplexity on {text} against cost",
            "; ".join(told) + f"; the original has {original:.2f}",
        )
