"""Tokens that take more steps than others: where in their windows, and in which blocks."""

from __future__ import annotations

from itertools import product

from spikellm.profiling.plots.canvas import SERIES, axes, inline_svg, label, legend
from spikellm.profiling.plots.grid import place_of
from spikellm.profiling.plots.picture import Picture
from spikellm.profiling.report import Report

_MARKERS = "ov"  # of the first kinds, and of the next
_SHOWN = 2000  # marks of a kind, at most


def massive(report: Report) -> Picture | None:
    """Place in the window of every token with extra steps, by block; None where there are none."""
    kinds: dict[str, dict[tuple[int, int], None]] = {}
    for name, extra in report.extra.items():
        place = place_of(name)
        if place is not None:
            own = kinds.setdefault(place.row, {})
            inside = extra.found[extra.found[:, 0] >= 0]
            own.update(dict.fromkeys((token, place.block) for token in inside[:, 1].tolist()))
    kinds = {kind: places for kind, places in kinds.items() if places}
    if not kinds:
        return None
    title = "Tokens with extra steps"
    found = sum(len(extra.found) for extra in report.extra.values())
    first = sum(extra.first for extra in report.extra.values())
    words = f"{found} times a token takes more steps, {first} times the first of its window"
    styles = [(color, marker) for marker, color in product(_MARKERS, SERIES)]
    blocks = 1 + max(place.block for name in report.extra if (place := place_of(name)))
    with axes(height=2.9) as (figure, axis):
        for index, (kind, places) in enumerate(kinds.items()):
            color, marker = styles[index % len(styles)]
            shift = 0.7 * ((index + 0.5) / len(kinds) - 0.5)  # kinds of one block side by side
            shown = list(places)[:_SHOWN]
            axis.scatter(
                [token for token, _ in shown],
                [block + shift for _, block in shown],
                s=9,
                color=color,
                marker=marker,
                label=kind,
            )
        axis.set_xlim(-0.03 * report.text.seqlen, report.text.seqlen)
        axis.set_ylim(blocks - 0.3, -0.7)
        label(axis, "position in the window", "block")
        legend(figure)
        svg = inline_svg(figure, "massive", title, words)
    return Picture(
        "massive",
        title,
        words,
        svg,
        "A mark is a token that takes more steps in the input of a layer, or in K or V, of any"
        " window. Which tokens, and how many: see the tables below.",
    )
