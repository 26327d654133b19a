"""Decoding several sequences at once beside one at a time, in turns in one process: seconds of the
thread's own processor time for a step, and tokens a second over those of one sequence.

    python benchmarks/batch.py out/w4a4-t2 --batches 2,8,32 --past 64

Tokens are drawn at random. A step reads the weights once for all sequences.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache

import spikellm


@torch.no_grad()
def ready(model: Any, batch: int, past: int) -> tuple[Any, torch.Tensor]:
    """A cache of ``batch`` sequences of ``past`` tokens, and a next token for each."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, past + 1))
    cache = DynamicCache(config=model.config)
    model(tokens[:, :past], past_key_values=cache, logits_to_keep=1)
    return cache, tokens[:, past:]


@torch.no_grad()
def step(model: Any, cache: Any, token: torch.Tensor) -> float:
    """Seconds of one step, which the cache grows by."""
    start = time.thread_time()
    model(token, past_key_values=cache, logits_to_keep=1)
    return time.thread_time() - start


def main() -> None:
    """Measure, and print a line for each number of sequences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batches", default="8", help="numbers of sequences, beside one")
    parser.add_argument("--past", type=int, default=64, help="tokens that are cached before")
    parser.add_argument("--repeat", type=int, default=15, help="steps of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, _ = spikellm.load(arguments.model, dtype="bfloat16")
    sizes = [1, *map(int, arguments.batches.split(","))]
    begun = {size: ready(model, size, arguments.past) for size in sizes}
    spent: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(arguments.repeat + 2):  # the first check the step and fill caches
        for size, (cache, token) in begun.items():
            spent[size].append(step(model, cache, token))
    found = {size: statistics.median(seconds[2:]) for size, seconds in spent.items()}
    for size, seconds in found.items():
        print(
            f"{size} at once: {1000 * seconds:.1f} ms a step, {size / seconds:.1f} tokens/s,"
            f" {size * found[1] / seconds:.2f} times one"
        )


if __name__ == "__main__":
    main()
