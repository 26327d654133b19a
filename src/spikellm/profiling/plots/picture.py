"""A picture with the words that go with it."""

from __future__ import annotations

from typing import NamedTuple


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
        name: unique in the page.
        description: what the picture shows, in words.
        svg: see :func:`spikellm.profiling.plots.canvas.inline_svg`.
        caption: how to read it.
    """

    name: str
    title: str
    description: str
    svg: str
    caption: str
