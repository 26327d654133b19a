"""Several recipes on one model, side by side: perplexity, average steps, size, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spikellm import api, console
from spikellm.errors import RequestError
from spikellm.evaluation.perplexity import perplexity_of_windows, text_windows
from spikellm.profiling.counts import FORMS
from spikellm.profiling.energy import OMITTED, estimate, load_table
from spikellm.profiling.operations import count_operations
from spikellm.workflow import report_block

ORIGINAL = "original"
_COUNTED_TOKENS = 2048
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
        seeds: one conversion for each; the mean and the standard deviation are given. The recipe's own seed by default.
        energy_table: see :func:`spikellm.profiling.energy.load_table`.
        limit: use the first ``limit`` windows only.
        visit: see :data:`Visitor`.

    Returns:
        ``{"model", "texts", "rows": [{"recipe", "perplexity": {text: {"value", "deviation", "ratio", "seeds"}}, "average_steps", "weight_bytes",
        "weight_ratio", "ace_ratio", "energy_ratio": {form: …}, "seconds", …}]}``; ``ratio`` is to the original, ``seconds`` of one conversion. Operations are counted
        over the whole model, attention and output projection included, on the first 2,048 tokens of the first text; energy is estimated from them.

    Raises:
        RequestError: nothing to compare; whatever :func:`spikellm.convert` and :func:`spikellm.perplexity` raise.
    """
    settings = list(settings)
    if not recipes or not texts:
        raise RequestError("nothing to compare: name at least one recipe and one text")
    for recipe in recipes:  # all are checked before anything slow
        api.resolve_recipe(recipe, calibration, samples, seqlen, None, settings)

    table = load_table(energy_table)
    windows: dict[str, Tensor] = {}

    def measure(recipe: str, seed: int | None) -> dict[str, Any]:
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
        values = {}
        for text in texts:
            if text not in windows:
                windows[text] = text_windows(loaded, tokenizer, text, seqlen=seqlen, limit=limit)
            with console.bar(f"{recipe}: perplexity on {text}") as update:
                values[text] = perplexity_of_windows(loaded, windows[text], update).value
        summary = api.summarize(loaded)
        sample = windows[texts[0]]
        counts = count_operations(loaded, [sample[: max(1, _COUNTED_TOKENS // sample.shape[1])]])["prefill"]
        extra = visit(recipe, loaded, tokenizer) if visit else {}
        return {
            "values": values,
            "seconds": seconds,
            "summary": summary,
            "extra": extra,
            "ace": counts.total().ace / counts.total().dense_ace,
            "energy": estimate(counts, table),
        }

    rows: list[dict[str, Any]] = []
    dense = 0
    for recipe in (ORIGINAL, *recipes):
        runs = [measure(recipe, seed) for seed in ((None,) if recipe == ORIGINAL else seeds or (None,))]
        summary = runs[0]["summary"]
        perplexity = {}
        for text in texts:
            values = [run["values"][text] for run in runs]
            value = statistics.fmean(values)
            base = rows[0]["perplexity"][text]["value"] if rows else value
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            perplexity[text] = {"value": value, "deviation": spread, "ratio": value / base, "seeds": len(values)}
        dense = summary.dense_bytes or dense
        rows.append(
            {
                "recipe": recipe,
                "perplexity": perplexity,
                "average_steps": summary.average_steps if summary.spiking_layers else None,
                "additive_share": summary.additive_share if summary.spiking_layers else None,
                "weight_bytes": summary.weight_bytes if summary.spiking_layers else None,
                "weight_ratio": summary.weight_bytes / summary.dense_bytes if summary.spiking_layers else 1.0,
                "ace_ratio": statistics.fmean(run["ace"] for run in runs),
                "energy_ratio": {
                    form: statistics.fmean(getattr(run["energy"], form) / run["energy"].dense for run in runs) for form in FORMS
                },
                "seconds": statistics.fmean(run["seconds"] for run in runs) if recipe != ORIGINAL else None,
                **runs[0]["extra"],
            }
        )
        console.note(
            f"{recipe}: {', '.join(_perplexity(rows[-1], text) for text in texts)}"
        )  # a long comparison that stops has said this much
    rows[0]["weight_bytes"] = dense  # what the converted layers take at 16 bits
    return {
        "model": str(model),
        "texts": list(texts),
        "energy_table": {"name": table.name, "source": table.source, "omits": OMITTED},
        "rows": rows,
    }


def _perplexity(row: dict[str, Any], text: str) -> str:
    one = row["perplexity"][text]
    spread = f" ± {one['deviation']:.2f}" if one["seeds"] > 1 else ""
    return f"{one['value']:.2f}{spread} ({one['ratio']:.3f}×)"


def show(result: dict[str, Any], style: console.Style = "table") -> None:
    """Print the table of :func:`compare`, for people or as Markdown, CSV or LaTeX."""
    rows = []
    for row in result["rows"]:
        measured = [_perplexity(row, text) for text in result["texts"]]
        share = "-" if row["additive_share"] is None else f"{row['additive_share']:.2f}"
        steps = "-" if row["average_steps"] is None else f"{row['average_steps']:.2f}"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f} s"
        energy = "/".join(f"{row['energy_ratio'][form]:.2f}" for form in FORMS)
        weights = f"{console.size(row['weight_bytes'])} ({row['weight_ratio']:.2f}×)"
        rows.append([row["recipe"], *measured, steps, share, f"{row['ace_ratio']:.3f}×", energy, weights, seconds])
    names = [Path(text).name for text in result["texts"]]
    columns = ["recipe", *(f"perplexity on {name}" for name in names), "steps", "additive", "ACE", "energy*", "block weights", "conversion"]
    console.table(Path(result["model"]).name, columns, rows, style=style)
    if style == "table":
        console.out.print(
            f"* merged/stepped/binary over the original, estimated from operation counts of the whole model ({result['energy_table']['name']}); leaves out {OMITTED}",
            highlight=False, markup=False,
        )  # fmt: skip
