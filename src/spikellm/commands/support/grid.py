"""Recipes times seeds on one model, measured: what ``compare`` and ``sweep`` are made of.

The original comes first. Texts are tokenized once; conversions share the full-precision stream of
their calibration windows. Points may be kept in a folder, so that what is interrupted goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from spikellm import api
from spikellm.commands.support.inputs import require_texts
from spikellm.commands.support.measure import Measured, measure, perplexity_in_words, row_of
from spikellm.commands.support.options import GridOptions, Visitor
from spikellm.commands.support.progress import report_block
from spikellm.commands.support.sweep_folder import SweepFolder
from spikellm.conversion.fingerprint import model_fingerprint, versions
from spikellm.core import console
from spikellm.core.errors import RequestError
from spikellm.core.fingerprint import fingerprint
from spikellm.data.tokens import bos_token
from spikellm.evaluation.perplexity import text_windows
from spikellm.observers.activation_store import SharedStream
from spikellm.profiling.counts import DENSE_BITS
from spikellm.profiling.energy import OMITTED
from spikellm.profiling.energy_table import load_table
from spikellm.recipe import Recipe

ORIGINAL = "original"


class Point(NamedTuple):
    """What one row is of: its name, and the recipe that it is converted with."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """What is converted and measured: every point with every seed.

    Attributes:
        model: folder or hub name.
        texts: to measure perplexity on.
        out: folder of finished points; none are kept without.
        visit: see :data:`spikellm.commands.support.options.Visitor`.
    """

    model: str
    points: Sequence[Point]
    texts: Sequence[str]
    options: GridOptions
    out: Path | None = None
    visit: Visitor | None = None

    def seeds(self, point: Point) -> Sequence[int]:
        """Seeds of a point: its recipe's own by default."""
        return self.options.seeds or (point.recipe.seed,)

    def require_whole(self) -> None:
        """Check what can be checked before anything slow.

        Raises:
            RequestError: a text is not there, or a seed or a table of energies is not valid.
        """
        require_texts(self.texts, self.options.limit, self.options.bos)
        for seed in self.options.seeds:
            self.points[0].recipe.replaced({"seed": seed})
        table = load_table(self.options.energy_table)
        if table.multiply_accumulate(DENSE_BITS, DENSE_BITS) is None:
            raise RequestError(
                f"energy table {table.name} does not know fp16_multiply and fp16_add, so it says"
                " nothing of the original, which the others are compared with; take another table,"
                " or report"
            )


class Rows(NamedTuple):
    """A measured grid: rows as :func:`spikellm.commands.support.measure.row_of` gives them.

    Attributes:
        dense_bytes: what the layers that are converted take at 16 bits.
        bos: whether every window that was measured on starts with the BOS token.
    """

    original: dict[str, Any]
    points: list[dict[str, Any]]
    dense_bytes: int
    bos: bool


def run_grid(grid: Grid) -> Rows:
    """Measure the original, then convert and measure every point.

    Operations are counted over the whole model, attention and output projection included, on the
    first 2,048 tokens of the first text; energy is estimated from them.

    Raises:
        RequestError: the folder of points is of something else; whatever :func:`spikellm.convert`
            and :func:`spikellm.perplexity` raise.
    """
    run = _Run(grid)
    original = run.row(ORIGINAL, [run.original()], None)
    base = {text: found["value"] for text, found in original["perplexity"].items()}
    rows, dense = [], 0
    for point in grid.points:
        runs = [run.point(point, seed) for seed in grid.seeds(point)]
        rows.append(run.row(point.name, runs, base))
        dense = runs[0].summary.dense_bytes or dense
    return Rows(original, rows, dense, run.bos)


def table_data(grid: Grid) -> dict[str, Any]:
    """The table of energies, and what it omits, as plain data."""
    table = load_table(grid.options.energy_table)
    return {"name": table.name, "source": table.source, "omits": OMITTED}


class _Run:
    """A grid while it runs: its texts as tokens, what its conversions share, how far it is."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.table = grid, load_table(grid.options.energy_table)
        self.total = sum(len(grid.seeds(point)) for point in grid.points)
        self.done, self.converted, self.started = 0, 0, time.monotonic()
        self.shared = SharedStream()
        self.extras: dict[str, dict[str, Any]] = {}
        self.first, self.tokenizer = self._load()
        self.windows: dict[str, Tensor] = {
            text: text_windows(
                self.first,
                self.tokenizer,
                text,
                seqlen=grid.options.seqlen,
                limit=grid.options.limit,
                bos=grid.options.bos,
            )
            for text in grid.texts
        }
        self.bos = bos_token(self.tokenizer, grid.options.bos) is not None
        self.folder = self._folder()

    def _load(self) -> tuple[Any, Any]:
        options = self.grid.options
        return api.load(
            self.grid.model, device=options.device, trust_remote_code=options.trust_remote_code
        )

    def _folder(self) -> SweepFolder | None:
        if self.grid.out is None:
            return None
        identity = {
            "model": model_fingerprint(self.first),
            "texts": {text: fingerprint(own) for text, own in self.windows.items()},
            "energy_table": self.table.model_dump(mode="json"),
            "versions": versions(),
        }
        return SweepFolder(self.grid.out, identity)

    def original(self) -> Measured:
        """The model before conversion; of its weights nothing is kept."""
        identity = {"original": True}
        known = self.folder.measured(identity) if self.folder else None
        found = known or self._measured(self.first, ORIGINAL, 0.0, identity)
        self.first = self.first.to("meta")
        return found

    def point(self, point: Point, seed: int) -> Measured:
        """One point with one seed, taken from the folder if it is there."""
        recipe = point.recipe.replaced({"seed": seed})
        identity: dict[str, Any] = {}
        self.done += 1
        if self.folder:
            text = fingerprint(api.calibration_windows(self.first, self.tokenizer, recipe))
            recipe_data = recipe.model_dump(mode="json", exclude={"name", "description"})
            identity = {"recipe": recipe_data, "text": text}
            if known := self.folder.measured(identity):
                return known
        console.note(f"{self.done} of {self.total}: {point.name}, seed {seed}{self._left()}")
        model, tokenizer = self._load()
        started = time.monotonic()
        api.convert(
            model,
            tokenizer,
            recipe,
            shared=self.shared,
            on_block=report_block(),
            on_stage=console.note,
        )
        self.converted += 1
        return self._measured(model, point.name, time.monotonic() - started, identity)

    def _left(self) -> str:
        if not self.converted:
            return ""
        each = (time.monotonic() - self.started) / self.converted
        return f", about {each * (self.total - self.done + 1):.0f} s left"

    def _measured(
        self, model: Any, name: str, seconds: float, identity: dict[str, Any]
    ) -> Measured:
        found = measure(model, self.windows, self.table, seconds, name)
        if self.grid.visit and name not in self.extras:
            self.extras[name] = self.grid.visit(name, model, self.tokenizer)
        return self.folder.keep(identity, found) if self.folder else found

    def row(
        self, name: str, runs: Sequence[Measured], base: dict[str, float] | None
    ) -> dict[str, Any]:
        """A row of the table; it is said at once, for a long run that stops has said this much."""
        row = {**row_of(name, runs, base), **self.extras.get(name, {})}
        words = ", ".join(perplexity_in_words(row, text) for text in self.grid.texts)
        console.note(f"{name}: {words}")
        return row
