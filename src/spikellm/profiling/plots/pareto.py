"""Accuracy against cost, with the Pareto front marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spikellm.profiling.plots.canvas import INK, MUTED, SERIES, axes, label, write_svg

_ACROSS = 4  # panels
_WIDE = 4  # times the least from which costs are drawn by their logarithm
_FAR = 4  # times the least perplexity from which a point stands at the upper edge
_PANEL = 140.0, 120.0  # points, about; enough to keep numbers apart
_ENOUGH = 20.0  # points between a number and anything else
_CORNERS = ((5, 4), (5, -9), (-10, 4), (-10, -9))  # of a mark, where its number may stand


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
    """Draw a panel for each cost that is not the same throughout: perplexity with error bars, the
    front, and the original; at the right its ratio to the original's.

    A perplexity far above the others stands at the upper edge with its number.

    Args:
        original: perplexity of the model that was converted.
        text: name of the text that perplexity was measured on.

    Raises:
        SpikeLLMError: the file system refused.
    """
    costs, fronts = _costs(points), []
    across = min(len(costs), _ACROSS)
    down = -(-len(costs) // across)
    least, most = _heights(points, original)
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
        grid[0, 0].set_ylim(least, most)
        for place, (axis, cost) in enumerate(zip(grid.flat, costs, strict=False)):
            axis.axhline(original, color=SERIES[1], linewidth=1, linestyle="--", label="original")
            front = _draw_panel(axis, points, cost)
            fronts.append(f"{cost}: front of {', '.join(point.name for point in front)}")
            label(axis, cost, "" if place % across else f"perplexity on {text}")
            if place % across == across - 1:
                _add_ratios(axis, original)
        key = "\n".join(
            f"{index}  {point.name}{_beyond(point, most)}"
            for index, point in enumerate(points, start=1)
        )
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=2, fontsize=8)
        figure.supxlabel(key, fontsize=7, x=0.02, ha="left", color=INK)
        words = f"{'; '.join(fronts)}; the original has {original:.2f}"
        write_svg(figure, path, f"Perplexity on {text} against cost", words)


def _costs(points: Sequence[Point]) -> list[str]:
    """Names of the costs that tell points apart; of all of them where none does."""
    named = list(dict.fromkeys(cost for point in points for cost in point.costs))

    def differs(cost: str) -> bool:
        return len({f"{one.costs[cost]:.4g}" if cost in one.costs else "" for one in points}) > 1

    return [cost for cost in named if differs(cost)] or named


def _heights(points: Sequence[Point], original: float) -> tuple[float, float]:
    """Perplexities from the lower to the upper edge."""
    found = [original, *(point.perplexity for point in points)]
    low = min(found)
    high = max(one for one in found if one <= _FAR * low)
    margin = 0.15 * (high - low) or 0.05 * low
    return low - margin, high + margin


def _add_ratios(axis: Any, original: float) -> None:
    """A scale at the right of a panel: perplexity over that of the original."""
    ratios = axis.secondary_yaxis(
        "right", functions=(lambda value: value / original, lambda ratio: ratio * original)
    )
    ratios.set_ylabel("over the original's")


def _beyond(point: Point, most: float) -> str:
    return f": perplexity {point.perplexity:,.4g}, above the picture" * (point.perplexity > most)


def _draw_panel(axis: Any, points: Sequence[Point], cost: str) -> list[Point]:
    """Draw the points that have a cost over it, numbered from 1 over all points; returns those on
    the front.
    """
    from matplotlib.ticker import LogLocator

    having = {number: one for number, one in enumerate(points, start=1) if cost in one.costs}
    on_front = pareto_front([(point.costs[cost], point.perplexity) for point in having.values()])
    found = [point.costs[cost] for point in having.values()]
    if min(found) > 0 and max(found) > _WIDE * min(found):
        axis.set_xscale("log", subs=())
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    most = axis.get_ylim()[1]
    for point, best in zip(having.values(), on_front, strict=True):
        above = point.perplexity > most
        axis.errorbar(
            [point.costs[cost]],
            [most if above else point.perplexity],
            yerr=None if above else point.deviation or None,
            fmt="^" if above else "o" if best else "x",
            color=SERIES[0] if best else MUTED,
            markersize=5,
            capsize=2.5,
            elinewidth=1,
            clip_on=False,
        )
    front = [point for point, best in zip(having.values(), on_front, strict=True) if best]
    x, y = zip(*sorted((point.costs[cost], point.perplexity) for point in front), strict=True)
    axis.plot(x, y, color=SERIES[0], linewidth=1, zorder=1, label="Pareto front")
    axis.margins(x=0.12)
    _number(axis, ((number, one.costs[cost], one.perplexity) for number, one in having.items()))
    return front


def _number(axis: Any, marks: Iterable[tuple[int, float, float]]) -> None:
    """Write the number of every mark beside it, at the corner that is furthest from the others."""
    axis.autoscale_view(scaley=False)
    most = axis.get_ylim()[1]
    place = axis.transData + axis.transAxes.inverted()
    numbers, spots = [], []
    for number, x, y in marks:
        across, up = place.transform((x, min(y, most)))
        numbers.append((number, (x, min(y, most))))
        spots.append((across * _PANEL[0], up * _PANEL[1]))
    taken = list(spots)
    for (number, at), (across, up) in zip(numbers, spots, strict=True):
        others = [spot for spot in taken if spot != (across, up)]
        spot, offset = max(
            (((across + right + 3, up + above + 3), (right, above)) for right, above in _CORNERS),
            key=lambda corner: min((_ENOUGH, *(_distance(corner[0], one) for one in others))),
        )
        taken.append(spot)
        axis.annotate(
            str(number), at, xytext=offset, textcoords="offset points", fontsize=7, color=INK
        )


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])
