"""What counting operations costs over a forward pass.

    python benchmarks/counting.py MODEL --text test.txt [--seqlen 512] [--threads 1] [--repeat 15]

Both passes run a window in turn, after one of each that is not timed; processor time, the least of
each, and the median of the ratios. The untimed pass finds what counting needs to know of every
layer (its fan-out above all), which is kept; it is printed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import spikellm
from spikellm.evaluation.perplexity import text_windows
from spikellm.models.prepare import evaluating
from spikellm.nn.execution import spiking_linears
from spikellm.profiling.counted_layer import counted_layer
from spikellm.profiling.operations import count_operations


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = spikellm.load(options.model)
    window = text_windows(model, tokenizer, options.text, seqlen=options.seqlen, limit=1)

    def forward() -> None:
        with torch.no_grad(), evaluating(model):
            model(window, use_cache=False)

    def counted() -> None:
        count_operations(model, [window])

    once = _seconds(lambda: [counted_layer(layer) for layer in spiking_linears(model).values()])
    forward()
    counted()
    times = [(_seconds(forward), _seconds(counted)) for _ in range(options.repeat)]
    plain, with_counts = (min(column) for column in zip(*times, strict=True))
    ratio = statistics.median(counts / alone for alone, counts in times)
    print(f"forward {plain:.3f} s, counted {with_counts:.3f} s, {ratio:.2f}×")
    print(f"facts of layers, once a model {once:.3f} s")


if __name__ == "__main__":
    main()
