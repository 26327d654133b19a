"""Which channels get the steps: perplexity over criteria, thresholds, and scores before or after smoothing.

    python benchmarks/saliency.py MODEL CALIBRATION TEST [--recipe spike-w4a4-t2] [--seeds 2,3,4] [--samples 16] [--limit 40] [--json FILE]

Each cell converts with the recipe's SmoothQuant start alone (no epochs, no clipping), so that the choice of channels is what differs; a seed draws other
calibration windows. Prints mean and standard deviation over the seeds, as ratios to the original model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import spikellm

START = ("omniquant.epochs=0", "omniquant.lwc=false")
CRITERIA = ("first-order", "expected-error", "rms", "layer-loss")


def variants() -> dict[str, list[str]]:
    """Settings by name of the variant."""
    found: dict[str, list[str]] = {"no salient channels": ["activations={bits: 4}"]}
    for criterion in CRITERIA:
        for thresholds in ("shared", "split"):
            for after in (False, True):
                settings = [
                    f"activations.saliency={criterion}", f"activations.thresholds={thresholds}", f"omniquant.saliency_after_smoothing={str(after).lower()}",
                ]  # fmt: skip
                found[f"{criterion}, {thresholds}, {'after' if after else 'before'}"] = settings
    found["layer-loss, split, after; each layer for itself"] = ["activations.salient_for=layer"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--recipe", default="spike-w4a4-t2")
    parser.add_argument("--seeds", default="2,3,4")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def perplexity(model: Any, tokenizer: Any) -> float:
        return spikellm.perplexity(model, tokenizer, arguments.test, seqlen=arguments.seqlen, limit=arguments.limit).value

    original = perplexity(*spikellm.load(arguments.model))
    print(f"original {original:.2f}", flush=True)
    rows = {}
    for name, settings in variants().items():
        ratios = []
        for seed in map(int, arguments.seeds.split(",")):
            model, tokenizer = spikellm.load(arguments.model)
            spikellm.convert(
                model, tokenizer, arguments.recipe, arguments.calibration, samples=arguments.samples, seqlen=arguments.seqlen, seed=seed,
                settings=[*START, *settings],
            )  # fmt: skip
            ratios.append(perplexity(model, tokenizer) / original)
        rows[name] = ratios
        spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        print(f"{name:<50} {statistics.fmean(ratios):8.3f} ± {spread:.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"original": original, "ratios": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
