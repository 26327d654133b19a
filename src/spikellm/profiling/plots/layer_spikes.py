"""Spikes of every layer: a map of all blocks whose cells lead to a raster and two histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.profiling.counts import Firing
from spikellm.profiling.glimpse import Glimpse
from spikellm.profiling.plots.grid import Place, place_of
from spikellm.profiling.plots.png import png_address
from spikellm.profiling.report import Report
from spikellm.profiling.sheets import count

# Colours that show on light and on dark, since a picture in an address knows neither.
MARKS = (
    ("positive", "#3a86e0"),
    ("negative", "#2f9e5f"),
    ("salient, positive", "#e0701c"),
    ("salient, negative", "#a066f5"),
)
_WIDE = 1536  # columns of pixels of a raster, and so channels, at most
_HIGH = 128  # rows of pixels of a raster, about
_BINS = 31
_PALEST, _DEEPEST = 8, 60  # percent of a cell's colour; words stay readable on it


class Cell(NamedTuple):
    """A layer in the map: where it leads, its firing rate in words, and the depth of its colour in
    percent; empty where a block has no such layer.
    """

    target: str = ""
    rate: str = ""
    depth: int = 0
    name: str = ""


class Histogram(NamedTuple):
    """A histogram.

    Attributes:
        title: what is counted.
        words: the whole in words.
        path: bars as an SVG path, one unit wide each, 30 high.
        bins: how many.
        marks: what stands below: at the left, in the middle, at the right.
    """

    title: str
    words: str
    path: str
    bins: int
    marks: tuple[str, str, str]


class Panel(NamedTuple):
    """What a page shows of one layer.

    Attributes:
        target: its place in the page; ``neighbours`` those of other panels, with words.
        salient: whether some channels are.
        facts: name and value of each.
        raster: address of the picture; ``told`` what it shows.
    """

    target: str
    name: str
    salient: bool
    neighbours: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    raster: str
    told: str
    histograms: tuple[Histogram, ...]


class LayerMap(NamedTuple):
    """All of it: kinds of layers, a row of cells a block, and panels."""

    kinds: list[str]
    rows: list[tuple[int, list[Cell]]]
    panels: list[Panel]


def target_of(name: str) -> str:
    """Place of a layer's spikes in the page."""
    place = place_of(name)
    word = name if place is None else f"{place.block}-{place.row}"
    return "spikes-" + word.replace("*", "x").replace(".", "-")


def targets(report: Report) -> dict[str, str]:
    """Places of all layers, by name, whose spikes a page shows."""
    return {name: target_of(name) for name in report.glimpses if _firing(report, name)}


def layer_map(report: Report) -> LayerMap:
    """Map and panels of all layers whose spikes a report has."""
    found = targets(report)
    places = {name: place for name in found if (place := place_of(name))}
    kinds = _in_order(report, [place.row for place in places.values()])
    by_place = {place: name for name, place in places.items()}
    rates = {name: _rate(report, name) for name in places}
    lowest, highest = min(rates.values(), default=0.0), max(rates.values(), default=0.0)
    rows = []
    for block in sorted({place.block for place in places.values()}):
        cells = []
        for kind in kinds:
            name = by_place.get(Place(block, kind))
            if name is None:
                cells.append(Cell())
                continue
            share = (rates[name] - lowest) / max(highest - lowest, 1e-12)
            depth = round(_PALEST + (_DEEPEST - _PALEST) * share)
            cells.append(Cell(found[name], f"{100 * rates[name]:.1f}", depth, name))
        rows.append((block, cells))
    panels = []
    order = [cell.name for _, cells in rows for cell in cells if cell.name]
    order += [name for name in found if name not in places]
    for index, name in enumerate(order):
        panels.append(_panel(report, name, _neighbours(order, index, by_place)))
    return LayerMap(kinds, rows, panels)


def _in_order(report: Report, kinds: list[str]) -> list[str]:
    """Kinds in the order in which a block runs them."""
    run = [
        place.row.removesuffix(".input")
        for name in report.prefill.firing
        if (place := place_of(name))
    ]
    ranks = {kind: rank for rank, kind in reversed(list(enumerate(run)))}
    return sorted(dict.fromkeys(kinds), key=lambda kind: ranks.get(kind, len(run)))


def _firing(report: Report, name: str) -> Firing | None:
    return report.prefill.firing.get(f"{name}.input") or report.prefill.firing.get(name)


def _rate(report: Report, name: str) -> float:
    firing = _firing(report, name)
    return float(firing.rates.mean()) if firing else 0.0


def _neighbours(
    order: list[str], index: int, by_place: dict[Place, str]
) -> tuple[tuple[str, str], ...]:
    """The layers before and behind, and the same layer of the blocks before and behind."""
    found = []
    place = place_of(order[index])
    if place is not None:
        for block in (place.block - 1, place.block + 1):
            other = by_place.get(Place(block, place.row))
            if other is not None:
                found.append((target_of(other), f"block {block}"))
    for other_index, words in ((index - 1, "previous layer"), (index + 1, "next layer")):
        if 0 <= other_index < len(order):
            found.append((target_of(order[other_index]), words))
    return tuple(found)


def _panel(report: Report, name: str, neighbours: tuple[tuple[str, str], ...]) -> Panel:
    own, firing = report.glimpses[name], _firing(report, name)
    assert firing is not None
    raster, told = _raster(own)
    return Panel(
        target_of(name),
        name,
        bool(own.salient.any()),
        neighbours,
        tuple(_facts(report, name, firing)),
        raster,
        told,
        (_sizes(own), _rates(firing)),
    )


def _facts(report: Report, name: str, firing: Firing) -> list[tuple[str, str]]:
    facts = [("firing rate", f"{float(firing.rates.mean()):.1%}")]
    facts += [
        (f"{form} spikes a value", f"{firing.spikes[form] / max(firing.codes, 1):.2f}")
        for form in ("phase", "binary")
    ]
    entry = report.prefill.layers.get(name)
    if entry is not None:
        bits = ", ".join(f"{a} × {b}" for a, b in sorted(entry.by_bits))
        facts += [
            ("bits, input × weight", bits),
            ("average steps", f"{entry.average_steps:.3f}"),
            ("synaptic operations, binary", count(entry.sops["binary"])),
        ]
    extra = report.extra.get(name)
    if extra is not None:
        words = f"{len(extra.found):,} of {extra.tokens:,}, {extra.steps} steps"
        facts.append(("tokens with extra steps", words))
    return facts


def _raster(own: Glimpse) -> tuple[str, str]:
    """Address of a raster, and what it shows."""
    stride = -(-own.planes.shape[1] // _WIDE)
    planes, salient = own.planes[:, ::stride], own.salient[::stride].byte()
    kinds = torch.zeros_like(planes, dtype=torch.uint8)
    for sign, kind in ((1, 1), (-1, 2)):
        kinds += (planes == sign).byte() * (kind + 2 * salient)
    each = max(1, _HIGH // len(planes))
    wide = max(1, _WIDE // kinds.shape[1])  # so that no page makes it wider, and so blurred
    pixels = kinds.repeat_interleave(each, 0).repeat_interleave(wide, 1)
    if each > 2:  # a gap between moments
        pixels[each - 1 :: each] = 0
    moments, channels = own.planes.shape
    whole = "" if stride == 1 else f", every {stride}th drawn"
    worth = (
        "each spike worth the same"
        if own.form == "binary"
        else "a spike of each moment worth half of one before"
    )
    told = (
        f"{own.form.capitalize()} spikes of token {own.token}:"
        f" {int((own.planes != 0).sum()):,} in {channels:,} channels (left to right{whole}) and"
        f" {moments} moments (top to bottom), {worth}."
    )
    return png_address(pixels, [color for _, color in MARKS]), told


def _sizes(own: Glimpse) -> Histogram:
    """How many spikes values have."""
    most = len(own.sizes) // 2
    wide = -(-len(own.sizes) // _BINS)
    values = torch.arange(-most, most + 1)
    places = torch.div(values + wide // 2, wide, rounding_mode="floor")
    places -= int(places.min())
    shares = torch.zeros(int(places.max()) + 1, dtype=torch.float64)
    shares.index_add_(0, places, own.sizes.double() / max(int(own.sizes.sum()), 1))
    silent = float(own.sizes[most] / max(int(own.sizes.sum()), 1))
    words = f"from −{most} to {most}; {silent:.1%} of values fire nothing"
    return _histogram("Binary spikes a value", words, shares, (f"−{most}", "0", f"{most}"))


def _rates(firing: Firing) -> Histogram:
    """How firing rates spread over channels."""
    rates = firing.rates.double().cpu()
    high = float(rates.max()) or 1.0
    shares = torch.histc(rates, bins=_BINS, min=0.0, max=high) / len(rates)
    words = f"from {float(rates.min()):.1%} to {high:.1%}, median {float(rates.median()):.1%}"
    return _histogram(
        "Firing rates of channels", words, shares, ("0", f"{high / 2:.0%}", f"{high:.0%}")
    )


def _histogram(title: str, words: str, shares: Tensor, marks: tuple[str, str, str]) -> Histogram:
    highest = float(shares.max()) or 1.0
    bars = _bars([30 * share / highest for share in shares.tolist()])
    return Histogram(title, f"{words}; highest bar {highest:.1%}", bars, len(shares), marks)


def _bars(heights: Sequence[float]) -> str:
    """Bars side by side, one unit wide with a gap, on the line at 30."""
    bars = (
        f"M{place} 30v-{height:.1f}h.9V30z" for place, height in enumerate(heights) if height > 0.04
    )
    return "".join(bars)
