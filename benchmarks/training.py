"""Time and memory of an update of training after conversion, beside forward and backward passes of
the original on the same tokens, in one process, one after the other.

    python benchmarks/training.py out/best-w4a4-1.10 MODEL --windows 4 --seqlen 512

Prints seconds of both, their ratio, and the largest resident memory of the process, which holds the
converted model and the original. Text has no influence on either, so tokens are drawn at random.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

import spikellm
from spikellm.core.memory import peak_memory
from spikellm.models.next_token import loss_backward
from spikellm.training.end_to_end import EndToEnd, EndToEndOptions
from spikellm.training.passes import Passes
from spikellm.training.positions import Positions


def main() -> None:
    """Measure, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("converted")
    parser.add_argument("original")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--products", default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="do not recompute blocks")
    given = parser.parse_args()
    options = EndToEndOptions(
        batch=given.windows, products=given.products, recompute=not given.keep
    )
    model, _ = spikellm.load(given.converted)
    tokens = torch.randint(
        0,
        model.get_input_embeddings().weight.shape[0],
        (given.windows, given.seqlen),
        generator=torch.Generator().manual_seed(0),
    )
    update = prepare(model, spikellm.load(given.original)[0], options, tokens)
    update()  # kernels are compiled and chosen
    updates = [update() for _ in range(given.repeats)]
    memory = peak_memory()  # before the original gets gradients of its weights
    original, _ = spikellm.load(given.original)
    passes = [timed(partial(loss_backward, original, tokens)) for _ in range(given.repeats)]
    ratio = min(updates) / min(passes)
    print(
        f"update {min(updates):.2f} s, original forward and backward {min(passes):.2f} s, ratio"
        f" {ratio:.2f}, at most {memory / 2**30:.2f} GiB"
    )


def prepare(model: Any, original: Any, options: EndToEndOptions, tokens: Tensor) -> Any:
    """What runs one update and gives its seconds."""
    stage = EndToEnd()
    for one in (model, original):
        one.requires_grad_(False)
    trained = stage.parameters(model, options)
    for part in trained:
        part.tensor.requires_grad_(True)
    positions = Positions(trained, options)
    passes = Passes(model, original, partial(stage.loss, options=options), options, offloads=False)

    def update() -> None:
        passes.backward(tokens, 1.0 / tokens.numel())
        positions.collect()
        positions.step(1.0)

    return partial(timed, update)


def timed(work: Any) -> float:
    """Seconds of processor time that a piece of work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
