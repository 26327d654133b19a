"""The demonstration: the bundled model under several recipes, side by side, with no download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from spikellm import api
from spikellm.commands import compare
from spikellm.core import console
from spikellm.core.files import require_free

RECIPES = ("rtn-w4a4", "w4a4-t2", "w4a4-t4")
PROMPT = "Return a list of"
_WINDOWS = 48
_SAMPLES = 16


def run(out: Path | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """Convert the bundled model with each recipe; measure and sample the original and every result.

    Args:
        out: folder that receives each converted model, under the name of its recipe; None keeps
            none.

    Returns:
        What :func:`spikellm.commands.compare.compare` gives on held-out docstrings, with a
        ``"sample"`` in every row.
    """
    if out is not None:
        for name in RECIPES:
            require_free(out / name, overwrite=overwrite)

    def visit(recipe: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        if out is not None and recipe != compare.ORIGINAL:
            api.save(model, tokenizer, out / recipe, overwrite=overwrite)
        return {"sample": api.generate(model, tokenizer, PROMPT, max_new_tokens=32)}

    console.note(
        "the bundled model (2.4M parameters) on docstrings of the standard library that it has not"
        " seen"
    )
    with resources.as_file(resources.files("spikellm") / "assets" / "stdlib-2m") as source:
        return compare.compare(
            source, RECIPES, ["stdlib"], "stdlib", samples=_SAMPLES, limit=_WINDOWS, visit=visit
        )


def show(result: dict[str, Any]) -> None:
    """Print the table and the samples."""
    compare.show(result)
    console.out.print(f"\nWhat each makes of the words {PROMPT!r}:", highlight=False)
    for row in result["rows"]:
        console.out.print(f"\n[bold]{row['recipe']}[/bold]", highlight=False)
        console.out.print(row["sample"], highlight=False, markup=False, soft_wrap=True)
