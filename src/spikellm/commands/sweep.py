"""The verb ``sweep``: many settings of one recipe on one model: perplexity against stored bits,
steps, arithmetic effort, spikes, synaptic operations and energy, with the Pareto fronts.

Every finished point is a file, so a sweep that is interrupted goes on, and another grid uses the
points that it has in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from spikellm.commands.support.options import GridOptions, Model, Texts
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SweepOptions(GridOptions):
    """What is varied, and where it is kept.

    Attributes:
        axes: ``key=value,value,…`` each; without any the recipe alone is measured.
        out: folder for finished points, the table (``result.json``) and the plot (``pareto.svg``);
            nothing is kept without.
    """

    recipe: Annotated[str, Option("Preset or YAML file to start from.", reads="recipes")] = (
        "w4a4-t2"
    )
    axes: Annotated[
        tuple[str, ...],
        Option(
            "Values of a recipe field; all combinations are tried. May be repeated.",
            "KEY=A,B,…",
            name="set",
        ),
    ] = ()
    out: Annotated[
        Path | None,
        Option(
            "Keep finished points, table and plot here; the same command goes on where it stopped.",
            "DIR",
            writes="folder",
        ),
    ] = None


_DEFAULT = SweepOptions()


@verbs.register("sweep")
def sweep(model: Model, perplexity: Texts, options: SweepOptions = _DEFAULT) -> dict[str, Any]:
    """Try all combinations of recipe settings: perplexity against stored bits, steps, arithmetic
    effort, spikes, synaptic operations and estimated energy, Pareto fronts marked.

    Example: spikellm sweep ./model --recipe w4a4-t2 --set activations.salient_rate=0.02,0.1 --set
    activations.salient_steps=2,4 --calibration train.txt --perplexity test.txt --out sweep

    Args:
        perplexity: texts; the first one decides the front.

    Returns:
        ``{"model", "recipe", "texts", "bos", "original": row, "rows": [row + {"point", "front":
        {cost: bool}}]}`` with rows as :func:`spikellm.commands.compare.compare` gives them; costs
        are those of :data:`spikellm.commands.support.costs.COSTS`.

    Raises:
        RequestError: a setting is not valid, ``out`` belongs to another model, text or version (the
            differing field is named), and whatever converting and measuring raise.
        DependencyError: ``out`` is given and what its plot is drawn with is not installed.
    """
    from spikellm.commands.support import grid as grids
    from spikellm.commands.support.axes import parse_axis, settings_of
    from spikellm.commands.support.costs import draw_costs, mark_fronts
    from spikellm.commands.support.sweep_folder import PLOT, RESULT, require_sweep_folder
    from spikellm.profiling.plots.canvas import require_pictures

    settings = settings_of(options.recipe, [parse_axis(axis) for axis in options.axes], options)
    if not perplexity:
        raise RequestError("nothing to measure on: give --perplexity")
    points = [grids.Point(setting.name, setting.recipe) for setting in settings]
    grid = grids.Grid(model, points, perplexity, options, out=options.out)
    grid.require_whole()
    if options.out is not None:
        require_sweep_folder(options.out)
        require_pictures()
    conversions = len(settings) * max(1, len(options.seeds))
    console.note(f"{len(settings)} settings, {conversions} conversions")
    original, rows, _, bos = grids.run_grid(grid)
    for row, setting in zip(rows, settings, strict=True):
        row.update(point=setting.values, front={})
    mark_fronts(rows, perplexity[0])
    result = {
        "model": model,
        "recipe": options.recipe,
        "texts": list(perplexity),
        "bos": bos,
        "original": original,
        "rows": rows,
    }
    if options.out is not None:
        console.write_json(result, str(options.out / RESULT))
        draw_costs(rows, original, perplexity[0], options.out / PLOT)
    return result


def show(
    result: dict[str, Any],
    style: console.Style = "table",
    options: SweepOptions = _DEFAULT,
) -> None:
    """Print the table; the last column names the fronts that a setting is on."""
    from spikellm.commands.support.measure import BOS_IN_WORDS

    keys = list(result["rows"][0]["point"])
    columns = [
        *(key.rpartition(".")[2] for key in keys),
        *(f"perplexity on {Path(text).name}" for text in result["texts"]),
        "steps",
        "ACE",
        "spikes a value",
        "energy, merged*",
        "stored bits**",
        "weights",
        "front",
    ]
    rows = [_original_cells(result, len(keys)), *(_cells(row, result) for row in result["rows"])]
    started = f"; {BOS_IN_WORDS}" if result["bos"] else ""
    title = f"{Path(result['model']).name}, {result['recipe']}{started}"
    console.table(title, columns, rows, left=len(keys), style=style)
    if style == "table":
        console.out.print(
            "Spikes a value are binary/phase, before linear layers. * estimated from operation"
            " counts, over the original. ** a weight of converted layers, with all that is"
            " stored because of it/a parameter of the whole model. On the front: no other setting"
            " has both less of that cost and a lower perplexity.",
            highlight=False,
            markup=False,
        )
    if options.out:
        console.note(f"points, table and plot are in {options.out}")


def _perplexities(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    from spikellm.commands.support.measure import perplexity_in_words

    return [perplexity_in_words(row, text) for text in result["texts"]]


def _original_cells(result: dict[str, Any], keys: int) -> list[str]:
    from spikellm.commands.support.measure import stored_in_words

    name = ["original", *[""] * (keys - 1)] if keys else []
    return [
        *name,
        *_perplexities(result["original"], result),
        "-",
        "1.000×",
        "-",
        "1.00",
        stored_in_words(result["original"]),
        "1.00×",
        "",
    ]


def _cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    from spikellm.commands.support.costs import fronts_in_words, spikes_in_words
    from spikellm.commands.support.measure import energy_in_words, stored_in_words

    return [
        *row["point"].values(),
        *_perplexities(row, result),
        "-" if row["average_steps"] is None else f"{row['average_steps']:.3f}",
        f"{row['ace_ratio']:.3f}×",
        spikes_in_words(row),
        energy_in_words(row["energy_ratio"]["merged"]),
        stored_in_words(row),
        f"{row['weight_ratio']:.3f}×",
        fronts_in_words(row),
    ]
