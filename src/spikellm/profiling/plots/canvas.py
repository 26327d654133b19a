"""Figures in the style of the project, as SVG inside a page or in a file of its own.

Figures are drawn in placeholder colours, which become CSS variables (``--ink``, ``--muted``,
``--grid``, ``--surface``, ``--series-1`` …), so that one picture is readable on a light page, on a
dark one and in print. Text stays text; every picture has a title and a description.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikellm.core.extras import require
from spikellm.core.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    SURFACE: "--surface",
    **{color: f"--series-{index}" for index, color in enumerate(SERIES, start=1)},
}
LIGHT = {
    "--ink": "#1b1f24",
    "--muted": "#57606a",
    "--grid": "#d8dee4",
    "--surface": "#ffffff",
    "--series-1": "#0a62c4",
    "--series-2": "#c4480a",
    "--series-3": "#1a7f45",
    "--series-4": "#8a3ffc",
    "--series-5": "#a3185c",
    "--series-6": "#6b5900",
}
DARK = {
    "--ink": "#e8eaed",
    "--muted": "#a6adb5",
    "--grid": "#3a4149",
    "--surface": "#14181d",
    "--series-1": "#6db3ff",
    "--series-2": "#ff9e64",
    "--series-3": "#6fd39a",
    "--series-4": "#c3a5ff",
    "--series-5": "#ff8ac0",
    "--series-6": "#d9c45a",
}
_LONGEST, _MOST_COLUMNS = 44, 4  # of a legend: letters of a name, and columns
HEAT = "cividis"  # a colour map that those who cannot tell red from green read as well
SMALL = 9.5  # points; the least that a telephone shows at ten pixels
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spikellm",
    "font.size": 10,
    "legend.fontsize": SMALL,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "path.simplify": False,
}
Point = tuple[float, float]


@contextmanager
def axes(width: float = 4.6, height: float = 2.8, **grid: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure with its axes in the style of the project, closed at the end.

    Args:
        width, height: inches; 4.6 fits a telephone without shrinking its text below what can be
            read.
        grid: for ``Figure.subplots``, for example ``nrows=2``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require_pictures()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**grid)


def require_pictures() -> None:
    """Check that the packages for pictures are installed, before the work that they show.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require("pictures", "report", "matplotlib")


def inline_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """SVG to stand in a page.

    Args:
        name: unique in the page; letters, digits and ``-``.
        title: what the picture is.
        description: what it shows, for those who do not see it.
    """
    drawing = io.StringIO()
    figure.savefig(
        drawing,
        format="svg",
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    svg = drawing.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: _shorter(path[0]), svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    opening = f'<svg role="img" aria-labelledby="{name}-title {name}-description" '
    words = (
        f'<title id="{name}-title">{escape(title)}</title><desc'
        f' id="{name}-description">{escape(description)}</desc>'
    )
    tag, rest = svg.split(">", 1)
    return f"{opening}{tag.removeprefix('<svg ')}>{words}{rest}"


def _shorter(path: str) -> str:
    """A path with its coordinates to a hundredth of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path).replace("\n", " ")


def css_of(scheme: Mapping[str, str]) -> str:
    """Declarations of CSS variables."""
    return " ".join(f"{name}: {value};" for name, value in scheme.items())


def write_svg(figure: Figure, path: Path, title: str, description: str) -> None:
    """Write a picture to a file of its own, light or dark as the reader's system is.

    Raises:
        SpikeLLMError: the file system refused.
    """
    svg = inline_svg(figure, path.stem.replace("_", "-"), title, description)
    light, dark = css_of(LIGHT).replace(" ", ""), css_of(DARK).replace(" ", "")
    style = (
        f"<style>svg{{{light}background:var(--surface)}}@media"
        f" (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    )
    tag, rest = svg.split(">", 1)
    write_atomically(
        path, lambda temporary: temporary.write_text(f"{tag}>{style}{rest}", encoding="utf-8")
    )


def legend(figure: Figure, handles: Sequence[Any] | None = None) -> None:
    """Legend above the axes, in as many columns as fit; of all labelled artists by default."""
    if handles is None:
        labelled: dict[str, Any] = {}
        for axis in figure.axes:
            for handle, words in zip(*axis.get_legend_handles_labels(), strict=True):
                labelled.setdefault(words, handle)
        handles = list(labelled.values())
    if not handles:
        return
    for handle in handles:
        words = handle.get_label()
        if len(words) > _LONGEST:
            handle.set_label(f"{words[: _LONGEST - 1]}…")
    longest = max(len(handle.get_label()) for handle in handles)
    columns = int(figure.get_figwidth() * 72 // (0.62 * SMALL * longest + 3.5 * SMALL))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(max(columns, 1), len(handles), _MOST_COLUMNS),
        columnspacing=1.2,
        borderpad=0.2,
    )


def strokes(axis: Axes, starts: Sequence[Point], ends: Sequence[Point], **style: Any) -> Any:
    """Many straight strokes as one path, which takes far less of a page than a mark each."""
    import numpy as np

    gaps = np.full((len(starts), 2), np.nan)
    points = np.stack((np.asarray(starts), np.asarray(ends), gaps), 1).reshape(-1, 2)
    return axis.plot(points[:, 0], points[:, 1], solid_capstyle="butt", **style)[0]


def label(axis: Axes, x: str, y: str) -> None:
    """Name both axes."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
