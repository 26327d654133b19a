"""The same codes as trains of several kinds: perplexity over spikes a value.

    python benchmarks/trains.py MODEL --calibration TEXT --perplexity TEXT [--samples 16]
    [--seqlen 256] [--limit 24] [--json FILE] [--plot FILE.svg]

Every recipe is converted once. A code can be fired as SpikeLLM does (of the code itself), about the
baseline in spikes of both signs, or in phases: the result is the same to the last bit, the spikes
are not. Printed and drawn are spikes a value before linear layers, each way. What ``--json`` holds
of an earlier run with the same options is not converted again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import spikellm
from spikellm.evaluation.perplexity import text_windows
from spikellm.profiling.operations import count_operations
from spikellm.profiling.plots.canvas import GRID, INK, SERIES, axes, label, write_svg

RECIPES = "w4a4-t2", "best-w4a4", "best-w4a8"
TRAINS = {
    "published": "of the code, as SpikeLLM fires",
    "binary": "about the baseline, both signs",
    "phase": "in phases, with the recipe's digits",
}
TOKENS = 2048  # that spikes are counted on


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asked.add_argument("model")
    for name in ("calibration", "perplexity"):
        asked.add_argument(f"--{name}", required=True)
    for name, number in (("samples", 16), ("seqlen", 256), ("limit", 24)):
        asked.add_argument(f"--{name}", type=int, default=number)
    asked.add_argument("--json", type=Path)
    asked.add_argument("--plot", type=Path)
    options = asked.parse_args()
    kept = options.json is not None and options.json.exists()
    found = json.loads(options.json.read_text()) if kept else {"rows": []}
    measure(found, options)
    for row in found["rows"]:
        spikes = "  ".join(f"{train} {row['spikes'][train]:6.2f}" for train in TRAINS)
        print(f"{row['recipe']:12} {row['ratio']:.3f}  {spikes}")
    if options.plot:
        draw(found, options.plot)


def measure(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Add what is missing: ratio of perplexity, and spikes a value of each train, by recipe."""
    window = {"seqlen": options.seqlen, "limit": options.limit}
    if "original" not in found:
        model, tokenizer = spikellm.load(options.model)
        found["model"] = Path(options.model).name
        found["original"] = spikellm.perplexity(
            model, tokenizer, options.perplexity, **window
        ).value
    known = {row["recipe"] for row in found["rows"]}
    for recipe in RECIPES:
        if recipe in known:
            continue
        model, tokenizer = spikellm.load(options.model)
        spikellm.convert(
            model,
            tokenizer,
            recipe,
            options.calibration,
            samples=options.samples,
            seqlen=options.seqlen,
        )
        value = spikellm.perplexity(model, tokenizer, options.perplexity, **window).value
        windows = text_windows(model, tokenizer, options.perplexity, **window)
        some = windows[: max(1, TOKENS // options.seqlen)]
        linear = count_operations(model, [some])["prefill"].total("linear")
        counts = {
            "published": linear.spikes_from_zero["binary"],
            "binary": linear.spikes["binary"],
            "phase": linear.spikes["phase"],
        }
        spikes = {train: counts[train] / linear.codes for train in TRAINS}
        ratio = value / found["original"]
        found["rows"].append({"recipe": recipe, "ratio": ratio, "spikes": spikes})
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


def draw(found: dict[str, Any], path: Path) -> None:
    """A line for each model, a mark for each train."""
    told = [
        f"{row['recipe']}: {row['ratio']:.3f} times, "
        + ", ".join(f"{train} {row['spikes'][train]:.2f}" for train in TRAINS)
        for row in found["rows"]
    ]
    with axes(width=7.0, height=3.4) as (figure, axis):
        for row in found["rows"]:
            places = list(row["spikes"].values())
            axis.plot(places, [row["ratio"]] * len(places), color=GRID, linewidth=1.2, zorder=1)
            axis.annotate(
                row["recipe"],
                (max(places), row["ratio"]),
                xytext=(7, -3),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
        for index, (train, words) in enumerate(TRAINS.items()):
            axis.scatter(
                [row["spikes"][train] for row in found["rows"]],
                [row["ratio"] for row in found["rows"]],
                color=SERIES[index],
                marker="sDo"[index],
                s=30,
                label=words,
                zorder=3,
            )
        axis.set_xscale("log")
        axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100, 200])
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: "")
        axis.margins(x=0.14)
        label(axis, "spikes a value before linear layers", "perplexity, original = 1")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)
        write_svg(
            figure, path, f"The same codes as several trains, {found['model']}", "; ".join(told)
        )


if __name__ == "__main__":
    main()
