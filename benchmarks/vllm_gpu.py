"""A converted model in vLLM on a GPU: does it load, does it say what spikellm says, and how fast.

    pip install vllm spikellm[gpu]
    python benchmarks/vllm_gpu.py out/w4a4 --original MODEL

Greedy answers to eight prompts, from vLLM and from `model.generate`, are compared token by token;
they may part where two tokens are nearly as likely, since attention and norms are others. Tokens a
second are those of all prompts at once; the original runs in bfloat16 beside it. Graph compilers
are off for both (`enforce_eager`): they would trace the spiking layers' torch reference.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from vllm import LLM, SamplingParams

import spikellm

PROMPTS = (
    "The history of the city begins with",
    "Water is a molecule that",
    "In the spring of 1911 the expedition",
    "A neuron fires when its membrane potential",
    "The first railway in the country was",
    "She opened the letter and read",
    "Of all the planets, Jupiter is",
    "The recipe needs flour, butter and",
)


def answers(name: str, tokens: int, share: float) -> tuple[list[list[int]], float]:
    """Tokens that vLLM adds to each prompt, and tokens a second."""
    model = LLM(name, enforce_eager=True, gpu_memory_utilization=share, dtype="bfloat16")
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    model.generate(PROMPTS[:1], asked)
    start = time.perf_counter()
    found = model.generate(list(PROMPTS), asked)
    seconds = time.perf_counter() - start
    del model
    torch.cuda.empty_cache()
    return [list(one.outputs[0].token_ids) for one in found], tokens * len(PROMPTS) / seconds


@torch.no_grad()
def expected(name: str, tokens: int) -> list[list[int]]:
    """Tokens that the model library adds."""
    model, tokenizer = spikellm.load(name, device="cuda:0", dtype="bfloat16")
    found = []
    for prompt in PROMPTS:
        given: Any = tokenizer(prompt, return_tensors="pt")["input_ids"].to("cuda:0")
        whole = model.generate(given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        found.append(whole[0, given.shape[1] :].tolist())
    return found


def main() -> None:
    """Compare, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--original", help="timed beside it")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    wanted = expected(arguments.model, arguments.tokens)
    found, rate = answers(arguments.model, arguments.tokens, 0.4)
    pairs = list(zip(found, wanted, strict=True))
    same = sum(one == other for pair in pairs for one, other in zip(*pair, strict=True))
    first = sum(one[:8] == other[:8] for one, other in pairs)
    print(f"{torch.cuda.get_device_name(0)}, {len(PROMPTS)} prompts at once")
    print(f"{rate:.1f} tokens/s, {same} of {arguments.tokens * len(pairs)} tokens the same,")
    print(f"the first eight of {first} of {len(pairs)} answers the same")
    if arguments.original:
        _, other = answers(arguments.original, arguments.tokens, 0.4)
        print(f"original in bfloat16: {other:.1f} tokens/s, ratio {rate / other:.2f}")


if __name__ == "__main__":
    main()
