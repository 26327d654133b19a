"""How far a converted model is from its original, token by token: mean Kullback-Leibler divergence
of next-token probabilities, which tells recipes apart on a few windows where perplexity does not.
With ``--blocks`` the first blocks alone are converted, on the stream that they are in.

    python benchmarks/divergence.py MODEL --calibration train.txt --text test.txt --blocks 6
        --recipes best-w4a4,best-w4a4+algorithm.compensation_percdamp=0.03
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import spikellm
from spikellm.evaluation.perplexity import text_windows
from spikellm.models.families import find_blocks
from spikellm.models.swap import replace_module
from spikellm.recipe.load import load_recipe


@torch.no_grad()
def log_probabilities(model: Any, window: Tensor) -> Tensor:
    return (
        torch.as_tensor(model(window.view(1, -1), use_cache=False).logits[0])
        .float()
        .log_softmax(-1)
    )


def convert(model: Any, tokenizer: Any, recipe: str, args: argparse.Namespace) -> float:
    """Convert the first blocks in place; average steps."""
    blocks = find_blocks(model)
    rest = list(blocks.modules)[args.blocks :] if args.blocks else []
    if rest:
        replace_module(model, blocks.name, nn.ModuleList(list(blocks.modules)[: args.blocks]))
    name, *settings = recipe.split("+")
    transforms = load_recipe(name, settings).transforms
    if rest and any(options.name == "residual-rotation" for options in transforms):
        raise SystemExit(f"{recipe} rotates the stream, which takes all blocks; leave --blocks out")
    found = spikellm.convert(
        model,
        tokenizer,
        name,
        args.calibration,
        samples=args.samples,
        seqlen=args.seqlen,
        settings=settings,
    )
    if rest:
        converted = list(find_blocks(model).modules)
        replace_module(model, blocks.name, nn.ModuleList([*converted, *rest]))
    return found.summary.average_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipes", required=True, help="comma-separated, settings after +")
    parser.add_argument("--blocks", type=int, default=0, help="the first so many; all if 0")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=6)
    args = parser.parse_args()
    model, tokenizer = spikellm.load(args.model)
    windows = text_windows(model, tokenizer, args.text, seqlen=args.seqlen, limit=args.limit)
    texts = [torch.as_tensor(window) for window in windows]
    exact = [log_probabilities(model, window).half() for window in texts]
    print("| recipe | average steps | divergence | CPU s |\n|---|---|---|---|")
    for recipe in args.recipes.split(","):
        model, tokenizer = spikellm.load(args.model)
        started = time.process_time()
        steps = convert(model, tokenizer, recipe, args)
        seconds, total, tokens = time.process_time() - started, 0.0, 0
        for window, expected in zip(texts, exact, strict=True):
            own = expected.float()
            found = log_probabilities(model, window)
            total += float((own.exp() * (own - found)).sum())
            tokens += len(own)
        print(f"| {recipe} | {steps:.3f} | {total / tokens:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
