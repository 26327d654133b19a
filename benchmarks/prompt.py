"""A prompt through a converted model and through its original, in turns in one process: seconds of
the thread's own processor time, so that other processes change little, and where those of the
converted model go.

    python benchmarks/prompt.py out/best-w4a4 MODEL --tokens 128,512

The original runs in bfloat16, and so does what of the converted model is not converted. Tokens are
drawn at random; only the logits of the last one are made.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import spikellm
from spikellm.kernels.native.linear import NativeLayer
from spikellm.models import attention_interface
from spikellm.nn.rotation import Rotation


def main() -> None:
    """Measure, and print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("converted")
    parser.add_argument("original")
    parser.add_argument("--tokens", default="128,512")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    converted, original = (
        spikellm.load(name, dtype="bfloat16")[0] for name in (given.converted, given.original)
    )
    rows = original.get_input_embeddings().weight.shape[0]
    for length in map(int, given.tokens.split(",")):
        tokens = torch.randint(0, rows, (1, length), generator=torch.Generator().manual_seed(0))
        taken: dict[str, list[float]] = {"converted": [], "original": []}
        for _ in range(given.repeats + 1):
            for name, model in (("converted", converted), ("original", original)):
                taken[name].append(seconds(model, tokens))
        own, other = (statistics.median(found[1:]) for found in taken.values())
        parts = ", ".join(f"{part} {spent:.3f}" for part, spent in shares(converted, tokens))
        print(f"{length} tokens: {own:.3f} s, original {other:.3f} s, ratio {other / own:.2f}")
        print(f"  of a pass: {parts}")


@torch.no_grad()
def seconds(model: Any, tokens: torch.Tensor) -> float:
    """Of one pass, with a cache as a prompt has it."""
    start = time.thread_time()
    model(tokens, use_cache=True, logits_to_keep=1)
    return time.thread_time() - start


def shares(model: Any, tokens: torch.Tensor) -> list[tuple[str, float]]:
    """Seconds that parts of a pass take, the longest first; attention contains none of the others
    but the coding of Q, K and V.
    """
    spent: Counter[str] = Counter()

    def clocked(run: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.thread_time()
            found = run(*arguments, **keywords)
            spent[part] += time.thread_time() - start
            return found

        return timed

    attended = attention_interface._attended
    with (
        mock.patch.object(NativeLayer, "__call__", clocked(NativeLayer.__call__, "spiking layers")),
        mock.patch.object(Rotation, "forward", clocked(Rotation.forward, "rotations")),
        mock.patch.object(attention_interface, "_attended", clocked(attended, "attention")),
    ):
        whole = seconds(model, tokens)
    spent["the rest"] = whole - sum(spent.values())
    return spent.most_common()


if __name__ == "__main__":
    main()
