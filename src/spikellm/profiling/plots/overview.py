"""The pictures of a report."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spikellm.profiling.counts import FORMS
from spikellm.profiling.plots.canvas import GRID, INK, MUTED, SERIES, axes, inline_svg, label
from spikellm.profiling.plots.grid import Grid, draw_grid, make_grid, place_of
from spikellm.profiling.plots.spikes import draw_raster
from spikellm.profiling.report import Report

_PANELS = 6  # inputs whose channels are drawn
_WIDE = 4  # largest over smallest value from which an axis is logarithmic


class Picture(NamedTuple):
    """A picture for a page: what it is called, what it shows in words, SVG, and how to read it."""

    name: str
    title: str
    description: str
    svg: str
    caption: str


def pictures(report: Report) -> list[Picture]:
    """All pictures that a report has something to show in."""
    drawn = (
        accuracy,
        energy,
        steps_by_layer,
        channels,
        firing_by_layer,
        firing_distribution,
        raster,
        error_by_block,
        sizes,
    )
    return [picture for draw in drawn if (picture := draw(report))]


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
        axis.legend(fontsize=8)
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
    """Estimated energy of every form, by part."""
    title = "Energy, estimated from operation counts"
    forms, parts = ("dense", *FORMS), ("linear", "attention", "head")
    tokens = report.prefill.tokens
    shares = {
        part: [getattr(report.energy[part], form) / tokens / 1e6 for form in forms]
        for part in parts
    }
    words = (
        "; ".join(
            f"{form}: " + ", ".join(f"{part} {shares[part][place]:.3g}" for part in parts)
            for place, form in enumerate(forms)
        )
        + " µJ a token"
    )
    names = ("original, 16 bits", *forms[1:])
    with axes(height=2.4) as (figure, axis):
        left = [0.0] * len(forms)
        for index, part in enumerate(parts):
            axis.barh(
                names,
                shares[part],
                left=left,
                color=SERIES[index],
                label={"linear": "linear layers", "head": "output projection"}.get(part, part),
                height=0.6,
            )
            left = [a + b for a, b in zip(left, shares[part], strict=True)]
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("µJ a token")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)
        svg = inline_svg(figure, "energy", title, words)
    return Picture(
        "energy",
        title,
        words,
        svg,
        f"Arithmetic alone, from the table {report.table.name}. An estimate, not a measurement.",
    )


def _picture_of_grid(
    name: str,
    title: str,
    grid: Grid,
    measure: str,
    caption: str,
    low: float | None,
    high: float | None,
    unit: str = "",
) -> Picture:
    with axes(height=1.5 + 0.26 * len(grid.rows)) as (figure, axis):
        draw_grid(figure, axis, grid, measure, low, high)
        svg = inline_svg(figure, name, title, grid.words(unit))
    return Picture(name, title, grid.words(unit), svg, caption)


def steps_by_layer(report: Report) -> Picture | None:
    """Average steps of every converted layer."""
    grid = make_grid(
        {layer.name: layer.average_steps for layer in report.summary.layers if layer.spiking}
    )
    if not grid.rows:
        return None
    high = max(2.0, float(grid.values.nan_to_num(1.0).max()))
    return _picture_of_grid(
        "steps",
        "Average steps by layer",
        grid,
        "average steps",
        "Steps of inputs times steps of weights, mean over columns.",
        1.0,
        high,
    )


def firing_by_layer(report: Report) -> Picture | None:
    """Firing rates as a heat map over layers."""
    rates = {
        name.removesuffix(".input"): float(firing.rates.mean())
        for name, firing in report.prefill.firing.items()
    }
    grid = make_grid(rates)
    if not grid.rows:
        return None
    caption = (
        "Binary spikes over the most that could fire, mean over channels and tokens. With a"
        " baseline, zero current fires at z, not at 0."
    )
    return _picture_of_grid(
        "firing", "Firing rates by layer", grid, "firing rate", caption, None, None
    )


def firing_distribution(report: Report) -> Picture | None:
    """How firing rates spread over channels."""
    by_row: dict[str, list[torch.Tensor]] = {}
    for name, firing in report.prefill.firing.items():
        if place := place_of(name):
            by_row.setdefault(place.row.removesuffix(".input"), []).append(firing.rates)
    if not by_row:
        return None
    marks = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    spread = {
        row: torch.quantile(torch.cat(rates).double().cpu(), marks).tolist()
        for row, rates in by_row.items()
    }
    title = "Spread of firing rates over channels"
    words = "; ".join(
        f"{row}: least {q[0]:.2f}, tenth {q[1]:.2f}, median {q[2]:.2f}, nine tenths {q[3]:.2f},"
        f" most {q[4]:.2f}"
        for row, q in spread.items()
    )
    with axes(height=1.1 + 0.26 * len(spread)) as (figure, axis):
        for height, (least, tenth, median, ninth, most) in enumerate(spread.values()):
            axis.plot([least, most], [height, height], color=MUTED, linewidth=1)
            axis.plot(
                [tenth, ninth],
                [height, height],
                color=SERIES[0],
                linewidth=6,
                solid_capstyle="butt",
            )
            axis.plot([median], [height], marker="|", markersize=11, color=INK)
        axis.set_yticks(range(len(spread)), list(spread))
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("firing rate of a channel")
        svg = inline_svg(figure, "spread", title, words)
    return Picture(
        "spread",
        title,
        words,
        svg,
        "Thin line: all channels; thick: from the tenth to the ninetieth percentile; mark: median.",
    )


def channels(report: Report) -> Picture | None:
    """Which channels take more steps or a range of their own, block by block."""
    if not any(
        bool((steps != steps[0]).any()) or bool(report.own_range[name].any())
        for name, steps in report.steps.items()
    ):
        return None
    panels: dict[str, dict[int, torch.Tensor]] = {}
    drawn: list[dict[int, torch.Tensor]] = []
    for name, steps in report.steps.items():
        if (place := place_of(name)) and "*" not in place.row:
            panels.setdefault(place.row, {})[place.block] = (
                steps > steps.min()
            ).int() + 2 * report.own_range[name].int()
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for (
        row,
        blocks,
    ) in panels.items():  # layers that read one tensor share its choice: one panel says it
        if (
            not any(
                blocks.keys() == other.keys()
                and all(torch.equal(blocks[b], other[b]) for b in blocks)
                for other in drawn
            )
            and len(kept) < _PANELS
        ):
            kept[row] = blocks
            drawn.append(blocks)
    title, readers = "Salient channels of each input", {}
    for row, blocks in kept.items():
        same = [
            other
            for other, its in panels.items()
            if its.keys() == blocks.keys() and all(torch.equal(its[b], blocks[b]) for b in blocks)
        ]
        readers[row] = " = ".join(same)
    words = "; ".join(
        f"{readers[row]}: {sum(int((marks > 0).sum()) for marks in blocks.values())} of"
        f" {sum(marks.numel() for marks in blocks.values())} channels of all blocks"
        for row, blocks in kept.items()
    )
    kinds = (
        (1, SERIES[0], "more steps"),
        (2, SERIES[2], "a range of their own"),
        (3, SERIES[1], "both"),
    )
    with axes(height=0.7 + 1.15 * len(kept), nrows=len(kept), squeeze=False) as (figure, grid):
        for axis, (row, blocks) in zip(grid[:, 0], kept.items(), strict=True):
            for kind, color, _ in kinds:
                where = [
                    (channel, block)
                    for block, marks in blocks.items()
                    for channel in (marks == kind).nonzero().flatten().tolist()
                ]
                if where:
                    axis.scatter(
                        *zip(*where, strict=True), marker="|", s=22, linewidths=0.9, color=color
                    )
            axis.set_xlim(-1, next(iter(blocks.values())).numel())
            axis.set_ylim(max(blocks) + 0.7, -0.7)
            axis.set_title(readers[row], fontsize=8, loc="left")
            axis.set_ylabel("block")
        grid[-1, 0].set_xlabel("channel")
        present = {
            int(kind)
            for blocks in kept.values()
            for marks in blocks.values()
            for kind in marks.unique()
        }
        handles = [
            grid[0, 0].scatter([], [], marker="s", s=22, color=color, label=words)
            for kind, color, words in kinds
            if kind in present
        ]
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


def raster(report: Report) -> Picture | None:
    """Binary spikes of one token at the input of one layer."""
    if (sample := report.sample) is None:
        return None
    token = len(sample.codes) - 1
    planes = sample.of_token(token)
    title = f"Spikes of token {token} at {sample.name}"
    words = (
        f"{int((planes != 0).sum())} binary spikes of {planes.shape[1]} channels over"
        f" {planes.shape[0]} moments; {int(sample.salient.sum())} channels are salient"
    )
    with axes(height=3.0) as (figure, axis):
        draw_raster(axis, planes, sample.salient)
        figure.legend(loc="outside upper left", ncols=3, fontsize=8, markerscale=2)
        svg = inline_svg(figure, "raster", title, words)
    return Picture(
        "raster",
        title,
        words,
        svg,
        "The binary form of one token: a mark is a spike of 0 or 1. spikellm trace shows that their"
        " sums are the merged integers.",
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
        axis.set_xticks(range(0, len(errors), max(1, len(errors) // 16)))
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
