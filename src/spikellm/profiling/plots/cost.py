"""Pictures of what a model costs: accuracy against effort, energy, error by block, sizes."""

from __future__ import annotations

from spikellm.profiling.counts import EXECUTION_MODES
from spikellm.profiling.plots.canvas import (
    GRID,
    MUTED,
    SERIES,
    SMALL,
    axes,
    inline_svg,
    label,
    legend,
)
from spikellm.profiling.plots.grid import block_ticks
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.report import Report

_WORDS = {"linear": "linear layers", "head": "output projection", "memory": "weights read"}
_WIDE = 4  # ratio of the largest to the smallest value from which an axis is logarithmic


def accuracy(report: Report) -> Picture:
    """Perplexity against arithmetic effort."""
    points = [(row.name, row.ace / row.dense_ace, row.perplexity) for row in report.beside]
    points.append((report.name, report.ace / report.dense_ace, report.text.perplexity))
    title = "Accuracy against arithmetic effort"
    words = "; ".join(
        f"{name}: ACE {ace:.3f} of the original at 16 bits, perplexity {value:.2f}"
        for name, ace, value in points
    )
    with axes() as (figure, axis):
        for index, (name, ace, value) in enumerate(points):
            axis.scatter(
                [ace],
                [value],
                s=46,
                color=SERIES[index % len(SERIES)],
                label=name,
                zorder=3,
                marker="o" if index + 1 < len(points) else "D",
            )
        axis.set_xscale("log", base=2)
        values = [value for *_, value in points]
        if max(values) > _WIDE * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            axis.yaxis.set_minor_formatter(lambda value, _: "")
        axis.margins(0.2)
        legend(figure)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        label(
            axis,
            "ACE of the linear layers, original at 16 bits = 1",
            f"perplexity on {report.text.name}",
        )
        svg = inline_svg(figure, "accuracy", title, words)
    return Picture(
        "accuracy",
        title,
        words,
        svg,
        (
            "Lower and further left is better."
            if report.beside
            else "Name the original with --beside MODEL to see it here."
        ),
    )


def energy(report: Report) -> Picture:
    """Estimated energy of every execution mode, by part; other rows together. None is drawn of a
    mode whose linear layers are not known, which what is left would make look cheap.
    """
    title = "Energy, estimated from operation counts"
    modes, parts = ("dense", *EXECUTION_MODES), ("linear", "attention", "head", "memory", "rest")
    tokens = report.prefill.tokens
    shares = {part: [0.0] * len(modes) for part in parts}
    linear = report.energy["linear"]
    nothing = [mode for mode, own in zip(modes, linear.columns(), strict=True) if own is None]
    unknown = set()
    for name, own in report.energy.items():
        if name == "whole":
            continue
        part = name if name in parts else "rest"
        for place, picojoules in enumerate(own.columns()):
            if modes[place] not in nothing:
                shares[part][place] += (picojoules or 0.0) / tokens / 1e6
            if picojoules is None:
                unknown.add(f"{name} ({modes[place]})")
    lines = []
    for place, mode in enumerate(modes):
        values = ", ".join(f"{_WORDS.get(part, part)} {shares[part][place]:.3g}" for part in parts)
        lines.append(f"{mode}: {'not known' if mode in nothing else values}")
    words = "; ".join(lines) + " µJ a token"
    missing = f" Not known to it: {', '.join(sorted(unknown))}." if unknown else ""
    names = ("original, 16 bits", *modes[1:])
    with axes(height=2.4) as (figure, axis):
        left = [0.0] * len(modes)
        for index, part in enumerate(parts):
            axis.barh(
                names,
                shares[part],
                left=left,
                color=SERIES[index],
                label=_WORDS.get(part, part),
                height=0.6,
            )
            left = [a + b for a, b in zip(left, shares[part], strict=True)]
        for mode in nothing:
            axis.annotate(
                "linear layers not known",
                (0.0, modes.index(mode)),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
                color=MUTED,
            )
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("µJ a token")
        legend(figure)
        svg = inline_svg(figure, "energy", title, words)
    return Picture(
        "energy",
        title,
        words,
        svg,
        f"From the table {report.table.name}.{missing} An estimate, not a measurement.",
    )


def error_by_block(report: Report) -> Picture | None:
    """Relative error behind each block, as the conversion recorded it."""
    if report.origin is None:
        return None
    errors = [block["relative_loss"] for block in report.origin.record["blocks"]]
    title = "Error behind each block"
    words = "; ".join(f"block {index}: {error:.2%}" for index, error in enumerate(errors))
    with axes(height=2.2) as (figure, axis):
        axis.bar(range(len(errors)), [100 * error for error in errors], color=SERIES[0], width=0.7)
        axis.grid(visible=False, axis="x")
        axis.set_xticks(block_ticks(len(errors)))
        label(axis, "block", "squared error, %")
        svg = inline_svg(figure, "error", title, words)
    return Picture(
        "error",
        title,
        words,
        svg,
        "Squared difference to the original on the calibration text, over the mean square of the"
        " original's stream.",
    )


def sizes(report: Report) -> Picture:
    """Bytes before and after."""
    summary = report.summary
    rest = (summary.total_bytes - sum(layer.weight_bytes for layer in summary.layers)) / 2**20
    dense_left = sum(layer.weight_bytes for layer in summary.layers if not layer.spiking) / 2**20
    rows = {
        "original, 16 bits": (summary.dense_bytes / 2**20,),
        "this model": (summary.weight_bytes / 2**20,),
    }
    title = "Size of the weights"
    words = "; ".join(
        f"{name}: converted layers {values[0]:.2f} MiB" for name, values in rows.items()
    )
    words += (
        f"; layers left as they were {dense_left:.2f} MiB; embeddings, norms and the rest"
        f" {rest:.2f} MiB"
    )
    with axes(height=1.8) as (figure, axis):
        axis.barh(
            list(rows),
            [values[0] for values in rows.values()],
            color=[GRID, SERIES[0]],
            height=0.55,
        )
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("MiB of the converted layers")
        svg = inline_svg(figure, "sizes", title, words)
    return Picture(
        "sizes",
        title,
        words,
        svg,
        f"Codes, scales and channel groups. Besides: {dense_left:.2f} MiB of layers left as they"
        f" were, {rest:.2f} MiB of embeddings, norms and the rest.",
    )
