"""Converted models beside llama.cpp where the machine is busy: models are loaded once, and turns
are short.

    python benchmarks/llama_cpp.py PROGRAM --pairs MODEL=FILE.gguf … [--prompt 128,512] [--new 64]
    [--turns 5] [--threads 1]

Each turn runs the model in this process and right after it llama.cpp's llama-bench on the file;
their ratio is that of neighbours in time. Prints medians and the range of ratios. Memory, and
models in processes of their own: ``spikellm bench --llama-bench``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import spikellm
from spikellm.commands.support import timing
from spikellm.commands.support.llama_turn import Peer


@torch.no_grad()
def turn(model: Any, peer: Peer, work: timing.Work) -> tuple[float, ...]:
    """Tokens a second of the prompt and after it, of the model and of llama.cpp."""
    first, decode, _ = timing._timed(model, work, None)
    other = peer.turn(work)
    return (
        work.prompt / first,
        work.new / decode,
        work.prompt / other.first_token,
        work.new / other.decode,
    )


def ratios(own: list[float], other: list[float]) -> str:
    """Median of the ratios of neighbours, smallest and largest."""
    found = sorted(one / two for one, two in zip(own, other, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="MODEL=FILE")
    parser.add_argument("--prompt", default="128,512")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for pair in arguments.pairs:
        name, _, file = pair.partition("=")
        model, _ = spikellm.load(name)
        peer = Peer(arguments.program, Path(file), file, None)
        for prompt in map(int, arguments.prompt.split(",")):
            work = timing.Work(prompt, arguments.new, arguments.threads, "", energy=False)
            rates = zip(*(turn(model, peer, work) for _ in range(arguments.turns)), strict=True)
            prefill, decode, their_prefill, their_decode = map(list, rates)
            print(f"{Path(name).name} beside {Path(file).name}, {prompt} tokens of prompt:")
            for what, own, other in (
                ("prompt", prefill, their_prefill),
                ("decode", decode, their_decode),
            ):
                medians = f"{statistics.median(own):.1f} and {statistics.median(other):.1f}"
                print(f"  {what}: {medians} tokens/s, ratio {ratios(own, other)}", flush=True)


if __name__ == "__main__":
    main()
