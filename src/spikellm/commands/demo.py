"""The verb ``demo``: the bundled model under several recipes, side by side, with no download."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from spikellm.commands import compare
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.files import require_free

RECIPES = ("rtn-w4a4", "w4a4-t2", "w4a4-t4")
PROMPT = "Return a list of"
_WINDOWS = 48
_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What is kept.

    Attributes:
        out: folder that receives each converted model, under the name of its recipe; None keeps
            none.
    """

    out: Annotated[
        Path | None,
        Option("Keep the converted models in this folder.", writes="folder", within=RECIPES),
    ] = None
    force: Annotated[bool, Option("Overwrite the models of these recipes in --out.")] = False


_DEFAULT = DemoOptions()


@verbs.register("demo")
def demo(options: DemoOptions = _DEFAULT) -> dict[str, Any]:
    """Convert the bundled model with several recipes and compare them. No download, about a minute.

    Example: spikellm demo --out spiking

    Returns:
        What :func:`spikellm.commands.compare.compare` gives on held-out docstrings, with a
        ``"sample"`` in every row.
    """
    from spikellm import api

    out, force = options.out, options.force
    if out is not None:
        for name in RECIPES:
            require_free(out / name, overwrite=force)

    def visit(recipe: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        if out is not None and recipe in RECIPES:
            api.save(model, tokenizer, out / recipe, overwrite=force)
        return {"sample": api.generate(model, tokenizer, PROMPT, max_new_tokens=32)}

    console.note(
        "the bundled model (2.4M parameters) on docstrings of the standard library that it has not"
        " seen"
    )
    short = compare.CompareOptions(calibration="stdlib", samples=_SAMPLES, limit=_WINDOWS)
    with resources.as_file(resources.files("spikellm") / "assets" / "stdlib-2m") as source:
        return compare.compare(str(source), RECIPES, ("stdlib",), short, visit)


def show(result: dict[str, Any]) -> None:
    """Print the table and the samples."""
    compare.show(result)
    console.out.print(f"\nWhat each makes of the words {PROMPT!r}:", highlight=False)
    for row in result["rows"]:
        console.out.print(f"\n[bold]{row['recipe']}[/bold]", highlight=False)
        console.out.print(row["sample"], highlight=False, markup=False, soft_wrap=True)
