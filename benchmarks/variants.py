"""What the ablations share: perplexity of variants of one recipe over seeds, as ratios to the
original model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import spikellm


def parse(description: str, recipe: str, samples: int, limit: int | None) -> argparse.Namespace:
    """Command line of an ablation."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument(
        "--seeds",
        default="2,3,4",
        help="one conversion for each; a seed draws other calibration windows",
    )
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=limit, help="first windows of the test text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, variants: Mapping[str, Sequence[str]]) -> None:
    """Convert and measure every variant with every seed; print mean and standard deviation.

    Args:
        variants: settings (``key=value``) by name.
    """
    torch.set_num_threads(arguments.threads)

    def perplexity(model: Any, tokenizer: Any) -> float:
        return spikellm.perplexity(
            model, tokenizer, arguments.test, seqlen=arguments.seqlen, limit=arguments.limit
        ).value

    original = perplexity(*spikellm.load(arguments.model))
    print(f"original {original:.2f}", flush=True)
    rows = {}
    for name, settings in variants.items():
        ratios = []
        for seed in map(int, arguments.seeds.split(",")):
            model, tokenizer = spikellm.load(arguments.model)
            spikellm.convert(
                model,
                tokenizer,
                arguments.recipe,
                arguments.calibration,
                samples=arguments.samples,
                seqlen=arguments.seqlen,
                seed=seed,
                settings=settings,
            )
            ratios.append(perplexity(model, tokenizer) / original)
        rows[name] = ratios
        spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        each = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{name:<50} {statistics.fmean(ratios):8.3f} ± {spread:.3f}   {each}", flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"original": original, "ratios": rows}, indent=1), encoding="utf-8"
        )
