"""The demonstration: the bundled model under several recipes, side by side, with no download."""

from __future__ import annotations

import time
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

from spikellm import api, console
from spikellm.files import require_free
from spikellm.workflow import report_block

RECIPES = ("rtn-w4a4", "w4a4-t2", "w4a4-t4")
PROMPT = "Return a list of"
_WINDOWS = 48
_SAMPLES = 16


def run(out: Path | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """Convert the bundled model with each recipe; measure and sample the original and every result.

    Args:
        out: folder that receives each converted model, under the name of its recipe; None keeps none.

    Returns:
        ``{"text", "prompt", "rows": [{"recipe", "perplexity", "average_steps", "weight_bytes", "seconds", "sample"}, …]}``
    """
    if out is not None:
        require_free(out, overwrite=overwrite)
    rows = []
    with ExitStack() as stack:
        source = stack.enter_context(resources.as_file(resources.files("spikellm") / "assets" / "stdlib-2m"))
        for recipe in ("original", *RECIPES):
            console.note(f"{recipe}: loading the bundled model")
            model, tokenizer = api.load(source)
            started = time.monotonic()
            if recipe != "original":
                api.convert(model, tokenizer, recipe, "stdlib", samples=_SAMPLES, on_block=report_block())
            seconds = time.monotonic() - started
            with console.bar(f"{recipe}: perplexity on held-out docstrings") as update:
                measured = api.perplexity(model, tokenizer, "stdlib", limit=_WINDOWS, on_batch=update)
            summary = api.summarize(model)
            dense = sum(layer.dense_bytes for layer in summary.layers if not layer.name.endswith("lm_head"))
            rows.append(
                {
                    "recipe": recipe, "perplexity": measured.value, "average_steps": summary.average_steps, "weight_bytes": summary.weight_bytes or dense,
                    "seconds": seconds, "sample": api.generate(model, tokenizer, PROMPT, max_new_tokens=32),
                }
            )  # fmt: skip
            if out is not None and recipe != "original":
                api.save(model, tokenizer, out / recipe, overwrite=overwrite)
    return {"text": f"stdlib, {_WINDOWS} held-out windows of {measured.seqlen} tokens", "prompt": PROMPT, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Print the table and the samples."""
    dense = result["rows"][0]["weight_bytes"]
    rows = [
        [
            row["recipe"],
            f"{row['perplexity']:.2f}",
            f"{row['average_steps']:.2f}",
            f"{console.size(row['weight_bytes'])} ({row['weight_bytes'] / dense:.2f}×)",
            f"{row['seconds']:.1f} s",
        ]
        for row in result["rows"]
    ]
    console.table(f"Bundled model on {result['text']}", ["recipe", "perplexity", "average steps", "block weights", "conversion"], rows)
    for row in result["rows"]:
        console.out.print(f"\n[bold]{row['recipe']}[/bold]", highlight=False)
        console.out.print(row["sample"], highlight=False, markup=False, soft_wrap=True)
