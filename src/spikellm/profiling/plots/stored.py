"""Accuracy against stored bits, with the Pareto front."""

from __future__ import annotations

from typing import Any, NamedTuple

from spikellm.profiling.comparison import original_of
from spikellm.profiling.plots.canvas import SERIES, axes, inline_svg, label, legend
from spikellm.profiling.plots.pareto import pareto_front
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.plots.published_marks import mark_published
from spikellm.profiling.published import MODEL, PUBLISHED
from spikellm.profiling.report import Report


class _Mark(NamedTuple):
    """A model: stored bits a weight, and its perplexity, over the original's where that is known;
    whether no other one has both less.
    """

    name: str
    bits: float
    height: float
    best: bool


def stored(report: Report) -> Picture:
    """Perplexity against stored bits a weight; over that of the original, and beside published
    systems, where the original was measured.
    """
    original = original_of(report)
    marks = _marks(report, 1.0 if original is None else original.perplexity)
    title, places = "Accuracy against stored bits", 2 if original is None else 3
    told = [
        f"{one.name}: {one.height:.{places}f} at {one.bits:.2f} bits"
        f"{', on the front' if one.best else ''}"
        for one in marks
    ]
    with axes(height=2.8 if original is None else 3.4) as (figure, axis):
        if original is not None:
            told += _draw_published(axis)
        for index, one in enumerate(marks):
            own = index + 1 == len(marks)
            axis.scatter(
                [one.bits],
                [one.height],
                s=50,
                marker="D" if own else "o",
                color=SERIES[0] if own else SERIES[2 + index % 4],
                label=one.name,
                zorder=3,
            )
        front = sorted((one.bits, one.height) for one in marks if one.best)
        axis.plot(*zip(*front, strict=True), color=SERIES[0], linewidth=1, label="Pareto front")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axis.set_yscale("log", base=2)
        unit = "" if original is None else "×"
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}{unit}")
        axis.margins(0.15)
        over = f"perplexity on {report.text.name}"
        label(
            axis,
            "stored bits a weight of converted layers",
            over if original is None else "perplexity over the original's",
        )
        legend(figure)
        words = "; ".join(told)
        svg = inline_svg(figure, "stored", title, words)
    caption = (
        "Name the original with --beside MODEL to see ratios and published systems."
        if original is None
        else f"Filled: measured here, on {report.text.name}. Open: published, {MODEL}; bits of"
        " their codes alone, to which scales come; they show orders of magnitude."
    )
    return Picture("stored", title, words, svg, caption)


def _marks(report: Report, base: float) -> list[_Mark]:
    rows = [(row.name, row.stored.bits_a_weight, row.perplexity) for row in report.beside]
    rows.append((report.name, report.summary.stored.bits_a_weight, report.text.perplexity))
    fronts = pareto_front([(bits, value) for _, bits, value in rows])
    return [
        _Mark(name, bits, value / base, best)
        for (name, bits, value), best in zip(rows, fronts, strict=True)
    ]


def _draw_published(axis: Any) -> list[str]:
    """Draw what others published; returns it in words."""
    mark_published(axis, lambda one: one.bits[0])
    return [
        f"{one.system} {one.setting}: {one.ratio:.3g} at {one.bits[0]} bits of codes"
        for one in PUBLISHED
    ]
