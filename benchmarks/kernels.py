"""Time of one linear layer: native kernels against torch and oneDNN, weights larger than the
caches.

    python benchmarks/kernels.py [--threads 1] [--size 4096] [--rows 1,256] [--repeat 30]
        [--only "16-bit inputs"] [--cpu-time]

Every contender has as many copies of its weights as fill 128 MiB and takes them in turn, so none
finds them in a cache; contenders take turns too, and medians are compared. "spikellm" is a whole
layer: inputs coded, product, thresholds, scales. Peers: bfloat16 linear, 4-bit weights with
bfloat16 inputs (_weight_int4pack_mm_for_cpu), int8 by int8 (oneDNN through _int_mm, no coding and
no scales). The floor is the time of reading the packed weights at the memory bandwidth that a sum
over 128 MiB of integers reaches.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from spikellm.kernels import describe
from spikellm.nn.formats import format_of
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe import ActivationRecipe, LinearRecipe

_MEMORY = 128 << 20


def spiking(size: int, recipe: LinearRecipe, seed: int = 0) -> SpikingLinear:
    """A layer of random weights, a tenth of its channels salient where the recipe says so."""
    generator = torch.Generator().manual_seed(seed)
    ternary = format_of(recipe.weights).name == "ternary"
    layer = SpikingLinear(size, size, recipe, bias=False, sizes=(size,) if ternary else ())
    group = torch.zeros(size, dtype=torch.uint8)
    if recipe.activations.spiking and recipe.activations.salient_rate:
        count = round(recipe.activations.salient_rate * size)
        group[torch.randperm(size, generator=generator)[:count]] = 2
    layer.set_groups(group)
    groups = len(layer.layout().weight_groups)
    scale, zero = (
        torch.rand(size, groups, generator=generator) + 0.5,
        torch.zeros(size, groups, dtype=torch.uint8),
    )
    if ternary:
        codes = torch.randint(-1, 2, (size, size), generator=generator, dtype=torch.int8)
    else:
        codes = torch.randint(
            0, 2**recipe.weights.bits, (size, size), generator=generator, dtype=torch.uint8
        )
        zero += 2 ** (recipe.weights.bits - 1)
    layer.set_weights(AffineWeights(codes, scale, zero))
    return layer


Contender = Callable[[], Iterator[Callable[[Tensor], object]]]


def contenders(size: int) -> dict[str, tuple[Contender, int]]:
    """Layers by name: how to make copies, and bytes of one."""

    def ours(weights: str | dict[str, int], activations: ActivationRecipe) -> tuple[Contender, int]:
        first = spiking(size, LinearRecipe(weights=weights, activations=activations))
        held = first.weight_bytes if first.format.name == "affine" else 0

        def make() -> Iterator[Callable[[Tensor], object]]:
            for seed in itertools.count():
                layer = spiking(size, first.settings, seed)
                yield lambda x, layer=layer: layer(x)

        return (
            make,
            held or size * size * 32 // 144,
        )  # the additive kernel reads words of 18 weights in 32 bits

    def dense() -> Iterator[Callable[[Tensor], object]]:
        while True:
            weight = torch.randn(size, size).bfloat16()
            yield lambda x, weight=weight: nn.functional.linear(x, weight)

    def int4() -> Iterator[Callable[[Tensor], object]]:
        while True:
            codes = torch.randint(0, 16, (size, size), dtype=torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            scales = torch.rand(size // 128, size, 2).bfloat16()
            yield (
                lambda x, packed=packed, scales=scales: torch.ops.aten._weight_int4pack_mm_for_cpu(
                    x, packed, 128, scales
                )
            )

    def int8() -> Iterator[Callable[[Tensor], object]]:
        while True:
            weight = torch.randint(-127, 128, (size, size), dtype=torch.int8)
            inputs: dict[int, Tensor] = {}
            yield lambda x, weight=weight, inputs=inputs: torch._int_mm(
                inputs.setdefault(len(x), torch.ones(len(x), size, dtype=torch.int8)), weight.T
            )

    t2 = ActivationRecipe(bits=4, salient_rate=0.1, salient_steps=2)
    ternary = "ternary"
    return {
        "torch bfloat16": (dense, 2 * size * size),
        "torch int4 weights": (int4, size * size // 2),
        "oneDNN int8": (int8, size * size),
        "spikellm ternary, 16-bit inputs (additive)": ours(ternary, ActivationRecipe(bits=16)),
        **{
            f"spikellm {bits}-bit weights, groups of 128, 16-bit inputs": ours(
                {"bits": bits, "group_size": 128}, ActivationRecipe(bits=16)
            )
            for bits in (2, 3, 4, 6, 8)
        },
        "spikellm 2-bit weights, 8-bit spikes": ours({"bits": 2}, ActivationRecipe(bits=8)),
        "spikellm 3-bit weights, 4-bit spikes": ours({"bits": 3}, ActivationRecipe(bits=4)),
        "spikellm 4-bit weights, 4-bit spikes, T = 2 on 10%": ours({"bits": 4}, t2),
        "spikellm 8-bit weights, 8-bit spikes": ours({"bits": 8}, ActivationRecipe(bits=8)),
    }


def bandwidth() -> float:
    """Bytes a second that this process reads from memory."""
    data = torch.ones(_MEMORY // 8, dtype=torch.int64)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return _MEMORY / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", default="1,256")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--only", default="", help="of spikellm only what has this in its name")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process: where others use the machine too"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    speed = bandwidth()
    print(
        f"{arguments.size} × {arguments.size}, {arguments.threads} thread(s), kernels:"
        f" {describe()}, memory {speed / 1e9:.1f} GB/s"
    )
    with torch.no_grad():
        all_of_them = {}
        for name, (make, size) in contenders(arguments.size).items():
            if name.startswith("spikellm") and arguments.only not in name:
                continue
            copies = max(2, -(-_MEMORY // size))
            all_of_them[name] = ([*itertools.islice(make(), copies)], size)
        for rows in map(int, arguments.rows.split(",")):
            x = torch.randn(rows, arguments.size).bfloat16()
            spent: dict[str, list[float]] = {name: [] for name in all_of_them}
            for turn in range(-2, arguments.repeat if rows == 1 else max(3, arguments.repeat // 6)):
                for name, (copies, _) in all_of_them.items():
                    for part in range(8 if rows == 1 else 1):
                        run = copies[(turn * 8 + part) % len(copies)]
                        started = clock()
                        run(x)
                        if turn >= 0:
                            spent[name].append(clock() - started)
            base = {name: statistics.median(times) for name, times in spent.items()}
            print(f"\n{rows} row(s)")
            for name, (_, size) in all_of_them.items():
                took = base[name]
                print(
                    f"{name:<54} {took * 1e3:8.3f} ms   {base['torch bfloat16'] / took:5.2f}× torch"
                    f" bfloat16   {base['torch int4 weights'] / took:5.2f}× torch int4  "
                    f" {size / speed / took:4.0%} of bandwidth"
                )


if __name__ == "__main__":
    main()
