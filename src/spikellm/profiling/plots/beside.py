"""Accuracy against arithmetic effort beside published systems."""

from __future__ import annotations

from itertools import cycle

from spikellm.profiling.comparison import converted, original_of
from spikellm.profiling.plots.canvas import MUTED, SERIES, axes, inline_svg, label, legend
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.published import CAUTION, MODEL, PUBLISHED
from spikellm.profiling.report import Report

_MARKERS = "osvPX^<>"  # of what others published


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
        for one, marker in zip(PUBLISHED, cycle(_MARKERS), strict=False):
            least, most = one.effort
            axis.scatter(
                [(least * most) ** 0.5],
                [one.ratio],
                s=40,
                marker=marker,
                facecolors="none",
                edgecolors=SERIES[1] if one.spikes else MUTED,
                linewidths=1.3,
                label=f"{one.system} {one.setting}",
            )
            told.append(f"{one.system} {one.setting}: {one.ratio:.3g} at {least:.3f}")
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
