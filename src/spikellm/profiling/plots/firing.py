"""Pictures of steps and firing rates over layers and channels."""

from __future__ import annotations

import torch

from spikellm.profiling.plots.canvas import INK, MUTED, SERIES, axes, inline_svg, legend
from spikellm.profiling.plots.grid import Grid, Scale, cell_words, draw_grid, make_grid, place_of
from spikellm.profiling.plots.layer_spikes import targets
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.plots.spikes import draw_raster
from spikellm.profiling.report import Report

_LEADS = " A cell leads to the spikes of its layer."


def steps_by_layer(report: Report) -> Picture | None:
    """Average steps of every converted layer."""
    grid = make_grid(
        {layer.name: layer.average_steps for layer in report.summary.layers if layer.spiking}
    )
    if not grid.rows:
        return None
    high = max(2.0, float(grid.values.nan_to_num(1.0).max()))
    return Picture(
        *_draw(report, "steps", "Average steps by layer", grid, Scale("average steps", 1.0, high)),
        "Steps of inputs times steps of weights, mean over columns." + _LEADS,
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
    return Picture(
        *_draw(report, "firing", "Firing rates by layer", grid, Scale("firing rate")),
        "Binary spikes over the most that could fire, mean over channels and tokens. Trains as"
        " published fire their baseline at rest; those about the baseline fire nothing." + _LEADS,
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
    lines = []
    for row, (least, tenth, median, ninth, most) in spread.items():
        lines.append(
            f"{row}: least {least:.2f}, tenth {tenth:.2f}, median {median:.2f},"
            f" nine tenths {ninth:.2f}, most {most:.2f}"
        )
    words = "; ".join(lines)
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
        axis.set_xlim(0, min(1.0, 1.05 * max(most for *_, most in spread.values()) or 1.0))
        axis.set_xlabel("firing rate of a channel")
        svg = inline_svg(figure, "spread", title, words)
    return Picture(
        "spread",
        title,
        words,
        svg,
        "Thin line: all channels; thick: from the tenth to the ninetieth percentile; mark: median.",
    )


def raster(report: Report) -> Picture | None:
    """Spikes of one token at the input of one layer in the middle of the model."""
    layers = [name for name in report.glimpses if name in report.steps]
    if not layers:
        return None
    name = layers[len(layers) // 2]
    own = report.glimpses[name]
    title = f"Spikes of token {own.token} at {name}"
    words = (
        f"{int((own.planes != 0).sum())} {own.form} spikes of {own.planes.shape[1]} channels over"
        f" {own.planes.shape[0]} moments; {int(own.salient.sum())} channels are salient"
    )
    with axes(height=3.0) as (figure, axis):
        places = range(len(own.planes))[::-1] if own.form == "phase" else ()
        draw_raster(axis, own.planes, own.salient, places)
        legend(figure)
        svg = inline_svg(figure, "raster", title, words)
    return Picture(
        "raster",
        title,
        words,
        svg,
        f"{own.form.capitalize()} execution of one token: a mark is a spike, in other colours where"
        " the channel is salient. All other layers stand under Spikes by layer; spikellm trace"
        " shows that their sums are the merged integers.",
    )


def _draw(
    report: Report, name: str, title: str, grid: Grid, scale: Scale
) -> tuple[str, str, str, str]:
    """Name, title, description and SVG of a grid, whose cells lead to spikes of layers."""
    links = {place: target for own, target in targets(report).items() if (place := place_of(own))}
    with axes(height=1.5 + 0.26 * len(grid.rows)) as (figure, axis):
        draw_grid(figure, axis, grid, scale)
        svg = inline_svg(figure, name, title, grid.words())
        within, _ = svg.rstrip().rsplit("</svg>", 1)
        return name, title, grid.words(), f"{within}{cell_words(axis, grid, links)}</svg>"
