"""Accuracy against arithmetic effort beside published systems."""

from __future__ import annotations

from spikellm.profiling.comparison import converted, original_of
from spikellm.profiling.plots.canvas import SERIES, axes, inline_svg, label, legend
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.plots.published_marks import mark_published
from spikellm.profiling.published import CAUTION, MODEL, PUBLISHED
from spikellm.profiling.report import Report


def published(report: Report) -> Picture | None:
    """Perplexity over that of the original against arithmetic effort; None where the original was
    not measured, or nothing is converted.
    """
    original, own = original_of(report), converted(report)
    if original is None or not own:
        return None
    title = "Beside published systems"
    told = []
    with axes(height=3.4) as (figure, axis):
        mark_published(axis, lambda one: (one.effort[0] * one.effort[1]) ** 0.5)
        for one in PUBLISHED:
            told.append(f"{one.system} {one.setting}: {one.ratio:.3g} at {one.effort[0]:.3f}")
        for index, row in enumerate(own):
            ratio, effort = row.perplexity / original.perplexity, row.ace / row.dense_ace
            color = SERIES[0] if index + 1 == len(own) else SERIES[2 + index % 4]
            axis.scatter([effort], [ratio], s=50, marker="D", color=color, label=row.name, zorder=3)
            told.insert(index, f"{row.name}: {ratio:.3f} at {effort:.3f}")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}×")
        axis.margins(0.15)
        label(
            axis,
            "ACE of the linear layers, original at 16 bits = 1",
            "perplexity over the original's",
        )
        legend(figure)
        words = "; ".join(told)
        svg = inline_svg(figure, "published", title, words)
    return Picture(
        "published",
        title,
        words,
        svg,
        f"Filled: measured here, on {report.text.name}. Open: published, {MODEL}; orange spikes,"
        f" grey does not. {CAUTION}",
    )
