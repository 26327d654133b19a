"""How the loss went while a model was trained after conversion."""

from __future__ import annotations

from spikellm.profiling.plots.canvas import MUTED, SERIES, axes, inline_svg, label, legend
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.report import Report

_SHOWN = 12  # losses that are told in words, at most


def training(report: Report) -> Picture | None:
    """Losses of updates and of what was held out; None of a model that was not trained."""
    record = None if report.origin is None else report.origin.record.get("training")
    if not record:
        return None
    title, losses, checks = "Loss while training", record["losses"], record["checks"]
    stride = max(1, -(-len(checks) // _SHOWN))
    told = [f"update {one['update']}: {one['loss']:.4f}" for one in checks[::stride]]
    words = "; ".join(told) or f"from {losses[0]:.4f} to {losses[-1]:.4f}"
    with axes(height=2.4) as (figure, axis):
        axis.plot(range(1, len(losses) + 1), losses, color=MUTED, linewidth=0.8, label="update")
        if checks:
            axis.plot(
                [one["update"] for one in checks],
                [one["loss"] for one in checks],
                color=SERIES[0],
                marker="o",
                markersize=3,
                label="held out",
            )
        axis.axvline(record["best"], color=SERIES[1], linewidth=0.8, linestyle="--", label="kept")
        label(axis, "update", "loss a token, nats")
        legend(figure)
        svg = inline_svg(figure, "training", title, words)
    return Picture(
        "training",
        title,
        words,
        svg,
        "Of the windows of each update, and of windows that were not trained on, by which the state"
        " that is kept was chosen.",
    )
