"""Converted models beside llama.cpp in processor time, for machines where other work runs.

    python benchmarks/llama_cpp.py PROGRAM --pairs MODEL=FILE.gguf … [--prompt 128] [--new 64]
    [--turns 3]

One thread. A turn runs the model in this process, then llama.cpp's llama-bench on the file without
warming up; what it takes to load is taken off by a run of one token. llama-bench decodes without a
prompt before, the model behind one. Wall-clock times, memory and processes of their own:
``spikellm bench --llama-bench``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import spikellm
from spikellm.runtime.decoder_step.summary import step_in_words, tried_step


def of_llama(program: str, file: str, prompt: int, new: int) -> float:
    """Seconds of processor time of a run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [program, "-m", file, "-t", "1", "-ngl", "0", "-r", "1", "--no-warmup"]
    command += ["-p", str(prompt), "-n", str(new)]
    subprocess.run(command, capture_output=True, check=True)  # noqa: S603
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@torch.no_grad()
def of_model(model: Any, prompt: int, new: int) -> tuple[float, float]:
    """Seconds of processor time of the prompt, and of the tokens after it."""
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt))
    model(tokens[:, :2], use_cache=False)
    tried_step(model)
    started = time.process_time()
    output = model(tokens, use_cache=True, logits_to_keep=1)
    middle = time.process_time()
    for _ in range(new):
        tokens = output.logits[:, -1:].argmax(-1)
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
    return middle - started, time.process_time() - middle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="MODEL=FILE")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for pair in arguments.pairs:
        name, _, file = pair.rpartition("=")
        model, _ = spikellm.load(name)
        of_model(model, 8, 4)
        print(f"{Path(name).name} beside {Path(file).name}; decoder step {step_in_words(model)}")
        ratios: dict[str, list[float]] = {"prompt": [], "decode": []}
        for _ in range(arguments.turns):
            prompt, decode = of_model(model, arguments.prompt, arguments.new)
            loaded = of_llama(arguments.program, file, 0, 1)
            their_decode = of_llama(arguments.program, file, 0, arguments.new + 1) - loaded
            their_prompt = of_llama(arguments.program, file, arguments.prompt, 0) - loaded
            ratios["prompt"].append(their_prompt / prompt)
            ratios["decode"].append(their_decode / decode)
            print(
                f"  prompt {prompt:.3f} s, llama.cpp {their_prompt:.3f} s;"
                f" decode {decode:.3f} s, llama.cpp {their_decode:.3f} s",
                flush=True,
            )
        for what, found in ratios.items():
            low, high = min(found), max(found)
            middle = statistics.median(found)
            print(f"  {what}: {middle:.2f} times as fast ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
