"""Many settings of one recipe on one model: perplexity against average steps and arithmetic effort,
with the Pareto front.

The original is loaded and measured once; texts are tokenized once; conversions share the
full-precision stream of their calibration windows. Every finished point is a file, so a sweep that
is interrupted goes on, and another grid uses the points that it has in common.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from spikellm import api
from spikellm.commands.inputs import require_texts
from spikellm.commands.measure import Measured, measure, perplexity_in_words, row_of
from spikellm.commands.sweep_folder import PLOT, RESULT, SweepFolder, require_sweep_folder
from spikellm.conversion.fingerprint import model_fingerprint, versions
from spikellm.core import console
from spikellm.core.errors import RecipeError, RequestError
from spikellm.core.fingerprint import fingerprint
from spikellm.evaluation.perplexity import text_windows
from spikellm.observers.activation_store import SharedStream
from spikellm.profiling.energy import EnergyTable, load_table
from spikellm.profiling.plots.canvas import require_pictures
from spikellm.profiling.plots.pareto import Point, pareto_front, write_pareto
from spikellm.recipe import Recipe

COSTS = {"average steps": "average_steps", "ACE, original = 1": "ace_ratio"}


class Axis(NamedTuple):
    """One recipe field and its values, as written."""

    key: str
    values: tuple[str, ...]


def parse_axis(text: str) -> Axis:
    """``key=a,b,c``; commas within brackets and quotes belong to a value.

    Raises:
        RequestError: no key, or no value.
    """
    key, _, values = text.partition("=")
    written = f"[{values}]"
    try:
        sequence = yaml.compose(written)  # whose parts know where they stand
        nodes = sequence.value if sequence else []
        parts = tuple(
            written[node.start_mark.index : node.end_mark.index].strip() for node in nodes
        )
    except yaml.YAMLError:
        parts = ()
    if not key.strip() or not parts or not all(parts):
        raise RequestError(
            f"--set {text!r}: expected key=value,value,…, for example"
            " activations.salient_rate=0.05,0.1"
        )
    return Axis(key.strip(), parts)


class Setting(NamedTuple):
    """A point of the grid: what was set, and the recipe that it makes."""

    values: dict[str, str]
    recipe: Recipe

    @property
    def name(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.values.items())


def grid_of(recipe: str | Path | Recipe, axes: Sequence[Axis], **changes: Any) -> list[Setting]:
    """All combinations of the axes' values, checked; those that make the same recipe are one.

    Args:
        changes: for :func:`spikellm.api.resolve_recipe`.

    Raises:
        RequestError: an axis is named twice or changes words alone, or a combination is no valid
            recipe; names it.
    """
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise RequestError(
            f"--set names {next(key for key in keys if keys.count(key) > 1)} twice; give all its"
            " values at once, separated by commas"
        )
    if labels := sorted({"name", "description"}.intersection(keys)):
        raise RequestError(
            f"--set {labels[0]}: it changes words alone, not the result; name a field that does"
        )
    found: dict[str, Setting] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = dict(zip(keys, values, strict=True))
        try:
            resolved = api.resolve_recipe(
                recipe, settings=[f"{key}={value}" for key, value in chosen.items()], **changes
            )
        except RecipeError as error:
            raise RequestError(
                f"{', '.join(f'{key}={value}' for key, value in chosen.items()) or 'the recipe'}:"
                f" {error}"
            ) from None
        found.setdefault(
            json.dumps(resolved.model_dump(mode="json", exclude={"name"}), sort_keys=True),
            Setting(chosen, resolved),
        )
    return list(found.values())


def sweep(
    model: str,
    recipe: str | Path,
    axes: Iterable[str],
    texts: Sequence[str],
    calibration: str | None = None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    seeds: Sequence[int] = (),
    limit: int | None = None,
    out: Path | None = None,
    energy_table: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Convert and measure a model with every combination of settings.

    Args:
        axes: ``key=value,value,…`` each; without any the recipe alone is measured.
        texts: to measure perplexity on; the first one decides the front.
        seeds: conversions of each point; mean and deviation are given. The recipe's own seed by
            default.
        out: folder for finished points, the table (``result.json``) and the plot (``pareto.svg``);
            nothing is kept without.

    Returns:
        ``{"model", "recipe", "texts", "original": row, "rows": [row + {"point", "front": {cost:
        bool}}]}`` with rows as :func:`spikellm.commands.compare.compare` gives them.

    Raises:
        RequestError: a setting is not valid, ``out`` belongs to another model, text or version (the
            differing field is named), and whatever converting and measuring raise.
        DependencyError: ``out`` is given and what its plot is drawn with is not installed.
    """
    settings = grid_of(
        recipe,
        [parse_axis(axis) for axis in axes],
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        seed=next(iter(seeds), None),
    )
    for seed in seeds:
        settings[0].recipe.replaced({"seed": seed})  # all are checked before anything slow
    if not texts:
        raise RequestError("nothing to measure on: give --perplexity")
    table = load_table(energy_table)
    require_texts(texts, limit)
    if out is not None:
        require_sweep_folder(out)
        require_pictures()
    console.note(f"{len(settings)} settings, {len(settings) * max(1, len(seeds))} conversions")
    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    windows = {
        text: text_windows(loaded, tokenizer, text, seqlen=seqlen, limit=limit) for text in texts
    }
    store = SweepFolder(
        out,
        {
            "model": model_fingerprint(loaded),
            "texts": {text: fingerprint(own) for text, own in windows.items()},
            "energy_table": table.model_dump(mode="json"),
            "versions": versions(),
        },
    )
    original = store.measured({"original": True}) or store.keep(
        {"original": True}, measure(loaded, windows, table, 0.0, "original")
    )
    shared, started, fresh = SharedStream(), time.monotonic(), 0
    runs = [
        (place, seed)
        for place, setting in enumerate(settings)
        for seed in seeds or (setting.recipe.seed,)
    ]
    found: list[list[Measured]] = [[] for _ in settings]
    for done, (place, seed) in enumerate(runs):
        setting = settings[place]
        resolved = setting.recipe.replaced({"seed": seed})
        text = fingerprint(api.calibration_windows(loaded, tokenizer, resolved))
        identity = {
            "recipe": resolved.model_dump(mode="json", exclude={"name", "description"}),
            "text": text,
        }
        known = store.measured(identity)
        if known is None:
            left = (
                f", about {(time.monotonic() - started) / fresh * (len(runs) - done):.0f} s left"
                if fresh
                else ""
            )
            console.note(
                f"{done + 1} of {len(runs)}: {setting.name or resolved.name}, seed {seed}{left}"
            )
            known = store.keep(
                identity,
                _convert_and_measure(
                    loaded, tokenizer, resolved, windows, table, shared, setting.name
                ),
            )
            fresh += 1
        found[place].append(known)
    rows = [
        {
            **row_of(setting.name or setting.recipe.name, own, original.perplexity),
            "point": setting.values,
            "front": {},
        }
        for setting, own in zip(settings, found, strict=True)
    ]
    first = texts[0]
    points = [
        Point(
            {words: row[cost] or 1.0 for words, cost in COSTS.items()},
            row["perplexity"][first]["value"],
            row["perplexity"][first]["deviation"],
            row["recipe"],
        )
        for row in rows
    ]
    for words, cost in COSTS.items():
        best = pareto_front([(point.costs[words], point.perplexity) for point in points])
        for row, is_best in zip(rows, best, strict=True):
            row["front"][cost] = is_best
    result = {
        "model": model,
        "recipe": str(recipe),
        "texts": list(texts),
        "original": row_of("original", [original], None),
        "rows": rows,
    }
    if out is not None:
        console.write_json(result, str(out / RESULT))
        write_pareto(points, original.perplexity[first], Path(first).name, out / PLOT)
    return result


def _convert_and_measure(
    original: Any,
    tokenizer: Any,
    recipe: Recipe,
    windows: dict[str, Tensor],
    table: EnergyTable,
    shared: SharedStream,
    label: str,
) -> Measured:
    model, started = copy.deepcopy(original), time.monotonic()
    api.convert(model, tokenizer, recipe, shared=shared)
    return measure(model, windows, table, time.monotonic() - started, label)


def show(result: dict[str, Any], style: console.Style = "table") -> None:
    """Print the table; a star marks what is on the front of steps, of effort."""
    keys = list(result["rows"][0]["point"])
    columns = [
        *(key.rpartition(".")[2] for key in keys),
        *(f"perplexity on {Path(text).name}" for text in result["texts"]),
        "steps",
        "ACE",
        "energy, merged*",
        "weights",
        "front",
    ]
    original = result["original"]
    rows = [["original", *[""] * (len(keys) - 1)] if keys else []]
    rows[0] += [
        *(perplexity_in_words(original, text) for text in result["texts"]),
        "-",
        "1.000×",
        "1.00",
        "1.00×",
        "",
    ]
    for row in result["rows"]:
        steps = "-" if row["average_steps"] is None else f"{row['average_steps']:.3f}"
        front = " ".join(
            words
            for words, cost in (("steps", "average_steps"), ("ACE", "ace_ratio"))
            if row["front"][cost]
        )
        rows.append(
            [
                *row["point"].values(),
                *(perplexity_in_words(row, text) for text in result["texts"]),
                steps,
                f"{row['ace_ratio']:.3f}×",
                f"{row['energy_ratio']['merged']:.2f}",
                f"{row['weight_ratio']:.3f}×",
                front,
            ]
        )
    console.table(
        f"{Path(result['model']).name}, {result['recipe']}",
        columns,
        rows,
        left=len(keys),
        style=style,
    )
    if style == "table":
        console.out.print(
            "* estimated from operation counts, over the original. On the front: no other setting"
            " has both less of that cost and a lower perplexity.",
            highlight=False,
            markup=False,
        )
