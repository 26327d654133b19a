"""Kernels on a GPU: checked against the reference, then timed beside torch.

    python benchmarks/gpu.py [--part check,layers,convert] [--json FILE] [--cases 40]

``check`` runs random layers of awkward sizes through the Triton kernels and through torch on the
same device, and compares codes and outputs; ``layers`` times whole layers (coding included) beside
torch's bfloat16 matrix product of the same size, with CUDA events, medians of many runs after
warming up; ``convert`` times a block of the shape of a model of 7 billion parameters. Needs nothing
from a network. Prints Markdown, with the machine. With ``TRITON_INTERPRET=1`` the check alone runs
on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import spikellm
from spikellm.kernels.base import backends
from spikellm.kernels.triton.presence import interpreting
from spikellm.models.rounding import fit_layer
from spikellm.nn.channels import Groups
from spikellm.nn.formats.ternary import plane_sizes
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe import ActivationRecipe, LinearRecipe

PARTS = ("check", "layers", "convert")
SALIENT = {"salient_rate": 0.1, "salient_steps": 2, "saliency": "rms"}
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4-bit weights, 4-bit spikes, T = 2 on 10%": ({"bits": 4}, {"bits": 4, **SALIENT}),
    "8-bit weights, 8-bit spikes, one range": ({"bits": 8}, {"bits": 8}),
    "4-bit weights alone, groups of 128": ({"bits": 4, "group_size": 128}, {"bits": 16}),
    "2-bit weights, 4-bit spikes": ({"bits": 2}, {"bits": 4}),
}
CACHED = 128 << 20  # bytes of weights that no cache holds
BLOCK = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def layer_of(
    columns: int, rows: int, weights: dict[str, Any], activations: dict[str, Any], device: str
) -> SpikingLinear:
    """A layer of random weights, the first channels salient if any are."""
    settings = LinearRecipe(
        weights=weights, activations=ActivationRecipe.model_validate(activations)
    )
    group = torch.zeros(columns, dtype=torch.uint8)
    salient = round(columns * settings.activations.salient_rate)
    group[torch.randperm(columns)[:salient]] = 1
    layer = fit_layer(nn.Linear(columns, rows), settings, Groups(group, None))
    return layer.to(device)


def check(cases: int, device: str) -> list[dict[str, Any]]:
    """Random layers: how many codes, and outputs, differ from the reference."""
    drawn, found = random.Random(0), {"cases": 0, "codes": 0, "outputs": 0, "farthest": 0.0}  # noqa: S311
    while found["cases"] < cases:
        columns, rows, tokens = (drawn.randint(1, most) for most in (700, 300, 150))
        activations: dict[str, Any] = {"bits": drawn.choice([1, 2, 4, 6, 8, 16])}
        if activations["bits"] < 8 and drawn.random() < 0.5:
            activations |= SALIENT
        weights = {
            "bits": drawn.randint(2, 8),
            "group_size": drawn.choice([None, 16, 128]),
            "symmetric": drawn.random() < 0.5,
        }
        layer = layer_of(columns, rows, weights, activations, device)
        spec = layer.spec()
        if backends["triton"].supports(spec) is not None:
            continue
        x = torch.randn(tokens, columns, device=device) * 10.0 ** drawn.randint(-3, 3)
        own, reference = (
            backends[name].prepare_linear(spec, layer).observed(x) for name in ("triton", "torch")
        )
        found["cases"] += 1
        if own.codes is not None and reference.codes is not None:
            found["codes"] += int((own.codes.int() != reference.codes).sum())
            found["outputs"] += int((own.y != reference.y).sum())
        size = reference.y.abs().max().clamp(min=1e-30)
        found["farthest"] = max(found["farthest"], float((own.y - reference.y).abs().max() / size))
    return [{"what": "layers against the reference", **found}]


def milliseconds(run: Callable[[], object], repeat: int = 50) -> float:
    """Median time on the device."""
    for _ in range(10):
        run()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def in_turns(made: list[SpikingLinear], x: Tensor) -> Callable[[], Tensor]:
    """A call of one layer after the other, so that no weights are found in a cache."""
    turns = itertools.cycle(made)
    return lambda: next(turns)(x)


def ternary_layer(columns: int, rows: int) -> SpikingLinear:
    """Random weights of −1, 0 and 1 on inputs that are not coded."""
    settings = LinearRecipe(weights="ternary", activations=ActivationRecipe(bits=16))
    steps = torch.ones(columns, dtype=torch.uint8)
    layer = SpikingLinear(columns, rows, settings, bias=False, sizes=plane_sizes(steps))
    layer.set_groups(torch.zeros(columns, dtype=torch.uint8), steps)
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    zero = torch.zeros(rows, 1, dtype=torch.uint8)
    layer.set_weights(AffineWeights(codes, torch.rand(rows, 1) + 0.1, zero))
    return layer.cuda()


def layers() -> list[dict[str, Any]]:
    """Whole layers beside torch's product in bfloat16."""
    found = []
    for columns, rows in ((4096, 4096), (4096, 11008)):
        made = {name: layer_of(columns, rows, *how, "cuda") for name, how in LAYERS.items()}
        made["ternary weights alone"] = ternary_layer(columns, rows)
        copies = {
            name: [copy.deepcopy(one) for _ in range(1 + CACHED // one.weight_bytes)]
            for name, one in made.items()
        }
        dense = nn.Linear(columns, rows, bias=False).bfloat16().cuda()
        whole = 1 + CACHED // (2 * columns * rows)
        originals = itertools.cycle([copy.deepcopy(dense) for _ in range(whole)])
        for tokens in (1, 16, 4096):
            x: Tensor = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
            with torch.no_grad():
                plain = milliseconds(lambda x=x, turns=originals: next(turns)(x))
                for name, layer in made.items():
                    own = milliseconds(in_turns(copies[name], x))
                    read = layer.weight_bytes / (own / 1e3) / 1e9
                    found.append(
                        {
                            "layer": name,
                            "shape": f"{tokens} × {columns} × {rows}",
                            "ms": round(own, 4),
                            "bfloat16 ms": round(plain, 4),
                            "times bfloat16": round(plain / own, 2),
                            "weights read, GB/s": round(read, 1),
                        }
                    )
    return found


def convert() -> list[dict[str, Any]]:
    """Seconds of a block of the shape of 7 billion parameters, 128 windows of 2,048 tokens."""
    words = ["return", "the", "value", "of", "list", "a", "file"]
    tokenizer = spikellm.load(Path(spikellm.__file__).parent / "assets" / "stdlib-2m")[1]
    found = []
    for recipe in ("gptq-w4a16", "best-w4a4-1.10"):
        config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **BLOCK)
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).cuda()
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "words.txt"
            torch.cuda.reset_peak_memory_stats()
            text.write_text(" ".join(random.Random(0).choices(words, k=600_000)))  # noqa: S311
            start = time.perf_counter()
            spikellm.convert(model, tokenizer, recipe, str(text), samples=128, seqlen=2048)
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
        seconds = time.perf_counter() - start
        found.append(
            {"recipe": recipe, "seconds a block": round(seconds, 1), "peak GiB": round(peak, 1)}
        )
    return found


def show(part: str, rows: list[dict[str, Any]]) -> None:
    """A table in Markdown."""
    print(f"\n### {part}\n")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--cases", type=int, default=40, help="random layers that are checked")
    parser.add_argument("--json", type=Path, help="write everything here too")
    options = parser.parse_args()
    chosen = options.part.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))} (valid: {', '.join(PARTS)})")
    if (missing := backends["triton"].missing()) is not None:
        parser.error(missing)
    device = "cpu" if interpreting() else "cuda"
    if interpreting() and chosen != ["check"]:
        parser.error("under Triton's interpreter there is nothing to time: take --part check")
    run: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "check": lambda: check(options.cases, device),
        "layers": layers,
        "convert": convert,
    }
    machine = f"{backends['triton'].describe()}, torch {torch.__version__}"
    print(machine)
    found: dict[str, Any] = {"machine": machine}
    for part in chosen:
        found[part] = run[part]()
        show(part, found[part])
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    if "check" in found and (found["check"][0]["codes"] or found["check"][0]["outputs"]):
        raise SystemExit("the kernels differ from the reference")


if __name__ == "__main__":
    main()
