"""Several recipes on one model, side by side: perplexity, average steps, size, time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spikellm import api
from spikellm.commands.convert import report_block
from spikellm.commands.inputs import require_texts
from spikellm.commands.measure import Measured, measure, perplexity_in_words, row_of
from spikellm.core import console
from spikellm.core.errors import RequestError
from spikellm.evaluation.perplexity import text_windows
from spikellm.profiling.counts import FORMS
from spikellm.profiling.energy import OMITTED, load_table

ORIGINAL = "original"
Visitor = Callable[[str, Any, Any], dict[str, Any]]
"""Called with recipe, model and tokenizer of every row; what it returns is added to the row."""


def compare(
    model: str | Path,
    recipes: Sequence[str],
    texts: Sequence[str],
    calibration: str | None = None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    seeds: Sequence[int] = (),
    limit: int | None = None,
    settings: Iterable[str] = (),
    energy_table: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    visit: Visitor | None = None,
) -> dict[str, Any]:
    """Convert one model with each recipe and measure it; the original comes first.

    Args:
        model: folder or hub name.
        recipes: presets or YAML files.
        texts: texts to measure perplexity on.
        seeds: one conversion for each; the mean and the standard deviation are given. The recipe's
            own seed by default.
        energy_table: see :func:`spikellm.profiling.energy.load_table`.
        limit: use the first ``limit`` windows only.
        visit: see :data:`Visitor`.

    Returns:
        ``{"model", "settings", "texts", "rows": [{"recipe", "perplexity": {text: {"value",
        "deviation", "ratio", "seeds"}}, "average_steps", "weight_bytes", "weight_ratio",
        "ace_ratio", "energy_ratio": {form: …}, "seconds", …}]}``; ``ratio`` is to the original,
        ``seconds`` of one conversion. Operations are counted over the whole model, attention and
        output projection included, on the first 2,048 tokens of the first text; energy is estimated
        from them.

    Raises:
        RequestError: nothing to compare; whatever :func:`spikellm.convert` and
            :func:`spikellm.perplexity` raise.
    """
    settings = list(settings)
    if not recipes or not texts:
        raise RequestError("nothing to compare: name at least one recipe and one text")
    require_texts(texts, limit)
    if ORIGINAL in recipes:
        raise RequestError(
            f"--recipes {ORIGINAL}: the row of that name is the model before conversion, which is"
            " always there; rename the recipe"
        )
    for recipe, seed in itertools.product(
        recipes, seeds or (None,)
    ):  # all are checked before anything slow
        api.resolve_recipe(recipe, calibration, samples, seqlen, seed, settings)
    table = load_table(energy_table)
    windows: dict[str, Tensor] = {}

    def run(recipe: str, seed: int | None) -> tuple[Measured, dict[str, Any]]:
        loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
        started = time.monotonic()
        if recipe != ORIGINAL:
            console.note(f"{recipe}{'' if seed is None else f', seed {seed}'}")
            api.convert(
                loaded,
                tokenizer,
                recipe,
                calibration,
                samples=samples,
                seqlen=seqlen,
                seed=seed,
                settings=settings,
                on_block=report_block(),
                on_stage=console.note,
            )
        seconds = time.monotonic() - started
        for text in texts:
            if text not in windows:
                windows[text] = text_windows(loaded, tokenizer, text, seqlen=seqlen, limit=limit)
        found = measure(loaded, windows, table, seconds, recipe)
        return found, visit(recipe, loaded, tokenizer) if visit else {}

    rows: list[dict[str, Any]] = []
    base: dict[str, float] | None = None
    dense = 0
    for recipe in (ORIGINAL, *recipes):
        runs, extras = zip(
            *(run(recipe, seed) for seed in ((None,) if recipe == ORIGINAL else seeds or (None,))),
            strict=True,
        )
        dense = runs[0].summary.dense_bytes or dense
        rows.append({**row_of(recipe, runs, base), **extras[0]})
        base = base or runs[0].perplexity
        console.note(
            f"{recipe}: {', '.join(perplexity_in_words(rows[-1], text) for text in texts)}"
        )  # a long comparison that stops has said this much
    rows[0]["weight_bytes"] = dense  # what the converted layers take at 16 bits
    return {
        "model": str(model),
        "settings": settings,
        "texts": list(texts),
        "energy_table": {"name": table.name, "source": table.source, "omits": OMITTED},
        "rows": rows,
    }


def show(result: dict[str, Any], style: console.Style = "table") -> None:
    """Print the table of :func:`compare`, for people or as Markdown, CSV or LaTeX."""
    rows = []
    for row in result["rows"]:
        measured = [perplexity_in_words(row, text) for text in result["texts"]]
        share = "-" if row["additive_share"] is None else f"{row['additive_share']:.2f}"
        steps = "-" if row["average_steps"] is None else f"{row['average_steps']:.2f}"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f} s"
        energy = "/".join(f"{row['energy_ratio'][form]:.2f}" for form in FORMS)
        weights = f"{console.size(row['weight_bytes'])} ({row['weight_ratio']:.2f}×)"
        rows.append(
            [
                row["recipe"],
                *measured,
                steps,
                share,
                f"{row['ace_ratio']:.3f}×",
                energy,
                weights,
                seconds,
            ]
        )
    names = [Path(text).name for text in result["texts"]]
    columns = [
        "recipe",
        *(f"perplexity on {name}" for name in names),
        "steps",
        "additive",
        "ACE",
        "energy*",
        "block weights",
        "conversion",
    ]
    changed = f", all with {', '.join(result['settings'])}" if result["settings"] else ""
    console.table(f"{Path(result['model']).name}{changed}", columns, rows, style=style)
    if style == "table":
        console.out.print(
            "* merged/stepped/binary over the original, estimated from operation counts of the"
            f" whole model ({result['energy_table']['name']}); leaves out {OMITTED}",
            highlight=False,
            markup=False,
        )
