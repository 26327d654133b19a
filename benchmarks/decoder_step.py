"""A decode step of a converted model: the library's pass and the native step in turns, in processor
time of one thread, and where the native step's time goes.

    python benchmarks/decoder_step.py MODEL [--prompt 64] [--repeat 15]

Processor time is what the thread itself used, so that other processes disturb it little. Times of
operations are of each alone, run again and again: its weights are in a cache, so they say what is
computed; what is left of the whole step is the wait for memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import spikellm
from spikellm.kernels.native.step_run import run_step
from spikellm.kernels.native.step_structs import KINDS
from spikellm.runtime.decoder_step.hook import step_state
from spikellm.runtime.decoder_step.step import entries_of
from spikellm.runtime.decoder_step.summary import NATIVE, step_in_words


def seconds(run: Callable[[], Any]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started


def median(times: list[float]) -> float:
    return statistics.median(times) * 1e3


def paths(model: Any, cache: Any, repeat: int) -> tuple[float, float]:
    """Milliseconds of a step of the library's pass and of the native one, in turns."""
    token, own = torch.tensor([[5]]), model.__dict__["forward"]
    by_library, natively = [], []

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)

    for _ in range(repeat):
        del model.__dict__["forward"]
        by_library.append(seconds(step))
        model.forward = own
        step()  # takes the cache over
        step()
        natively.append(seconds(step))
    return median(by_library), median(natively)


def parts(model: Any, cache: Any) -> tuple[float, Counter[str]]:
    """Milliseconds of a whole native call, and of its operations alone by kind."""
    step = step_state(model).step
    program, position = step.built.program, torch.tensor([[cache.get_seq_length()]])
    hidden = step.embed(torch.tensor([[5]]), position)
    given = step.given(hidden, position, None, entries_of(cache, 1))

    def timed(first: int, last: int) -> float:
        return median([seconds(lambda: run_step(program, given, (first, last))) for _ in range(5)])

    nothing, found = timed(0, 0), Counter[str]()
    for index, op in enumerate(program._ops):
        first = index
        while program._ops[first].a and KINDS[program._ops[first].kind] in ("linear", "additive"):
            first -= 1  # which codes for those behind it
        before = timed(first, index) if first < index else nothing
        found[KINDS[op.kind]] += timed(first, index + 1) - before
    return timed(0, program.length), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = spikellm.load(arguments.model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, arguments.prompt), generator=generator)
    with torch.no_grad():
        cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        first = seconds(lambda: model(tokens[:, :1], past_key_values=cache, use_cache=True))
        if step_in_words(model) != NATIVE:
            raise SystemExit(step_in_words(model))
        library, native = paths(model, cache, arguments.repeat)
        whole, found = parts(model, cache)
    print(f"library's pass {library:.2f} ms, native step {native:.2f} ms: {library / native:.2f}×")
    print(f"first step, with its check, {first * 1e3:.0f} ms; native call {whole:.2f} ms")
    for kind, own in found.most_common():
        if own > 0.05:
            print(f"{kind:10} {own:8.2f} ms")


if __name__ == "__main__":
    main()
