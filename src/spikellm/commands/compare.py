"""The verb ``compare``: several recipes on one model, side by side: perplexity, average steps,
size, time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from spikellm.commands.support.options import GridOptions, Model, Settings, Texts, Visitor
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class CompareOptions(GridOptions):
    """How the recipes are converted and measured.

    Attributes:
        settings: changes to all recipes, ``key=value`` each.
        plot: perplexity on the first text over every cost, with Pareto fronts; none without.
    """

    settings: Settings = ()
    plot: Annotated[
        Path | None,
        Option(
            "Write an SVG of perplexity over stored bits, steps, effort, spikes, SOPs and energy"
            " here.",
            "FILE",
            writes="file",
        ),
    ] = None


_DEFAULT = CompareOptions()


@verbs.register("compare")
def compare(
    model: Model,
    recipes: Annotated[
        tuple[str, ...],
        Option(
            "Presets or YAML files, separated by commas.",
            "A,B,…",
            separated=True,
            reads="recipes",
        ),
    ],
    perplexity: Texts,
    options: CompareOptions = _DEFAULT,
    visit: Visitor | None = None,
) -> dict[str, Any]:
    """Convert a model with several recipes and print one table. Nothing is saved.

    Examples:

      spikellm compare ./model --recipes rtn-w4a4,w4a4-t2 --calibration train.txt --perplexity
      test.txt

      spikellm compare ./model --recipes pbllm-90,ternary-1.7 --seeds 2,3,4 --perplexity test.txt
      --table latex > table.tex

    Args:
        visit: see :data:`spikellm.commands.support.options.Visitor`.

    Returns:
        ``{"model", "settings", "texts", "bos", "energy_table", "rows": [{"recipe", "perplexity":
        {text: {"value", "deviation", "ratio", "seeds"}}, "average_steps", "weight_density",
        "weight_bytes", "weight_ratio", "stored": {"bits_a_weight", "bits_a_parameter", "bytes",
        "bits": {kind: …}, "weights", "parameters"}, "ace_ratio", "energy_ratio": {mode: …},
        "energy_unknown", "spikes_a_value": {mode: …}, "sops_ratio": {mode: …}, "seconds",
        "front": {cost: bool}, …}]}``, the original first, which is on no front; ``ratio`` is to
        the original, ``seconds`` of one conversion; costs are those of
        :data:`spikellm.commands.support.costs.COSTS`. See
        :func:`spikellm.commands.support.grid.run_grid`.

    Raises:
        RequestError: nothing to compare; whatever :func:`spikellm.convert` and
            :func:`spikellm.perplexity` raise.
        DependencyError: ``plot`` is given and what draws it is not installed.
    """
    from spikellm import api
    from spikellm.commands.support.costs import draw_costs, mark_fronts
    from spikellm.commands.support.grid import ORIGINAL, Grid, Point, run_grid, table_data
    from spikellm.profiling.plots.canvas import require_pictures

    if not recipes or not perplexity:
        raise RequestError("nothing to compare: name at least one recipe and one text")
    if ORIGINAL in recipes:
        raise RequestError(
            f"--recipes {ORIGINAL}: the row of that name is the model before conversion, which is"
            " always there; rename the recipe"
        )
    seed = next(iter(options.seeds), None)
    points = [
        Point(
            recipe,
            api.resolve_recipe(
                recipe,
                options.calibration,
                options.samples,
                options.seqlen,
                seed,
                options.settings,
            ),
        )
        for recipe in recipes
    ]
    grid = Grid(model, points, perplexity, options, visit=visit)
    grid.require_whole()
    if options.plot is not None:
        require_pictures()
    original, rows, dense_bytes, bos = run_grid(grid)
    mark_fronts(rows, perplexity[0])
    if options.plot is not None:
        draw_costs(rows, original, perplexity[0], options.plot)
    return {
        "model": model,
        "settings": list(options.settings),
        "texts": list(perplexity),
        "bos": bos,
        "energy_table": table_data(grid),
        "rows": [{**original, "weight_bytes": dense_bytes, "front": {}}, *rows],
    }


def show(result: dict[str, Any], style: console.Style = "table") -> None:
    """Print the table, for people or as Markdown, CSV or LaTeX."""
    from spikellm.commands.support.measure import BOS_IN_WORDS

    texts = [Path(text).name for text in result["texts"]]
    columns = [
        "recipe",
        *(f"perplexity on {name}" for name in texts),
        "steps",
        "additive",
        "ACE",
        "spikes a value",
        "density",
        "SOPs/MACs",
        "energy*",
        "stored bits**",
        "MiB**",
        "conversion",
        "front",
    ]
    changed = f", all with {', '.join(result['settings'])}" if result["settings"] else ""
    rows = [_cells(row, result["texts"]) for row in result["rows"]]
    started = f"; {BOS_IN_WORDS}" if result["bos"] else ""
    title = f"{Path(result['model']).name}{changed}{started}"
    console.table(title, columns, rows, style=style)
    if style == "table":
        table = result["energy_table"]
        console.out.print(
            "Spikes a value are binary/phase, before linear layers; density is the share of weights"
            " that are not zero; SOPs over the original's MACs, binary/phase, are spikes times"
            " density. *"
            f" {'/'.join(result['rows'][0]['energy_ratio'])} over the original, estimated from"
            f" operation counts of the whole model ({table['name']}); leaves out"
            f" {table['omits']}{_unknown(result['rows'])}. ** bits a weight of converted layers,"
            " with all that is stored because of it/a parameter of the whole model; sizes of both."
            " On the front: no other recipe has both less of that cost and a lower perplexity on"
            " the first text.",
            highlight=False,
            markup=False,
        )


def _unknown(rows: list[dict[str, Any]]) -> str:
    found = sorted({name for row in rows for name in row["energy_unknown"]})
    return f"; not known to the table, and in no sum: {', '.join(found)}" if found else ""


def _cells(row: dict[str, Any], texts: list[str]) -> list[str]:
    from spikellm.commands.support.costs import fronts_in_words, sops_in_words, spikes_in_words
    from spikellm.commands.support.measure import (
        energy_in_words,
        perplexity_in_words,
        stored_in_words,
    )

    return [
        row["recipe"],
        *(perplexity_in_words(row, text) for text in texts),
        "-" if row["average_steps"] is None else f"{row['average_steps']:.2f}",
        "-" if row["additive_share"] is None else f"{row['additive_share']:.2f}",
        f"{row['ace_ratio']:.3f}×",
        spikes_in_words(row),
        "-" if row["weight_density"] is None else f"{row['weight_density']:.2f}",
        sops_in_words(row),
        "/".join(map(energy_in_words, row["energy_ratio"].values())),
        stored_in_words(row),
        f"{row['weight_bytes'] / 2**20:,.2f}/{row['stored']['bytes'] / 2**20:,.2f}",
        "-" if row["seconds"] is None else f"{row['seconds']:.1f} s",
        fronts_in_words(row),
    ]
