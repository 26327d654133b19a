"""Conversion of blocks of real size: memory must not grow with their number, time must grow in
proportion.

    python benchmarks/scale.py [--blocks 2,4] [--shape 4096,11008,32] [--recipes
    gptq-w4a16,spike-w4a4-t2] [--samples 8] [--seqlen 512] [--threads 2] [--folder DIR]

Makes models of random weights with decoder blocks of Llama-2-7B's shape (4096 channels, 11008
within, 32 heads; bfloat16) or another, and converts each with the command line, in a process of its
own. Pipelines that learn run one epoch. Prints peak memory (resident, files mapped into memory
included), seconds of each block, and their growth; on Linux also the peak within each block and
what is resident after it, which tell growth from chance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import spikellm
from spikellm.recipe.load import load_recipe

_RUN = """
import json, pathlib, sys, time
import psutil
from spikellm.__main__ import main
from spikellm.commands.support import progress as told
from spikellm.core.memory import peak_memory

within, after, seconds = [], [], []

def watched():
    def on_block(progress):
        within.append(peak_memory())
        after.append(psutil.Process().memory_info().rss)
        seconds.append(progress.seconds)
        if sys.platform == "linux":
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    return on_block

told.report_block = watched
started = time.monotonic()
status = main(sys.argv[1:])
peak, spent = max([*within, peak_memory()]), time.monotonic() - started
found = {"peak": peak, "within": within, "after": after, "blocks": seconds, "seconds": spent}
print(json.dumps(found))
sys.exit(status)
"""


def make(blocks: int, shape: str, folder: Path) -> None:
    """A folder with a model of random weights, written a block at a time."""
    channels, inner, heads = map(int, shape.split(","))
    config = transformers.LlamaConfig(
        vocab_size=32000,
        max_position_embeddings=2048,
        num_hidden_layers=blocks,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        hidden_size=channels,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Path(spikellm.__file__).parent / "assets" / "stdlib-2m"
    )
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()
        }
    generator, index, shards = torch.Generator().manual_seed(0), {}, dict[str, list[str]]()
    for name in shapes:
        found = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"model-{found[1] if found else 'ends'}.safetensors", []).append(name)
    for shard, names in shards.items():
        tensors = {
            name: (
                torch.ones(shapes[name], dtype=torch.bfloat16)
                if "norm" in name
                else torch.randn(shapes[name], generator=generator, dtype=torch.float32)
                .mul_(0.02)
                .bfloat16()
            )
            for name in names
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, shard))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def convert(model: Path, recipe: str, text: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and seconds of one conversion, and of each block."""
    out = model.with_name(f"{model.name}-{recipe}")
    quick = (
        ["--set", "algorithm.epochs=1"] if load_recipe(recipe).algorithm.name == "omniquant" else []
    )
    command = [
        sys.executable,
        "-c",
        _RUN,
        "convert",
        str(model),
        str(out),
        "--recipe",
        recipe,
        "--calibration",
        str(text),
        "--samples",
        str(arguments.samples),
        "--seqlen",
        str(arguments.seqlen),
        "--force",
        *quick,
    ]
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{recipe} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", default="2,4")
    parser.add_argument(
        "--shape",
        default="4096,11008,32",
        help="channels, channels within the feed-forward part, heads",
    )
    parser.add_argument("--recipes", default="gptq-w4a16,spike-w4a4-t2")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where models are made; a temporary folder by default"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "words.txt"
        vocabulary = ["return", "the", "value", "of", "list", "a", "file"]
        text.write_text(" ".join(random.Random(0).choices(vocabulary, k=20000)))  # noqa: S311
        print(f"{arguments.samples} × {arguments.seqlen} tokens, {arguments.threads} thread(s)")
        for recipe in arguments.recipes.split(","):
            first: dict[str, Any] = {}
            for blocks in map(int, arguments.blocks.split(",")):
                model = folder / f"{arguments.shape.replace(',', '-')}x{blocks}"
                if not model.exists():
                    make(blocks, arguments.shape, model)
                started = time.strftime("%H:%M:%S")
                found = convert(model, recipe, text, arguments)
                first = first or {**found, "count": blocks}
                each, growth = sum(found["blocks"]) / blocks, found["peak"] / first["peak"]
                slower = sum(found["blocks"]) / sum(first["blocks"])
                print(
                    f"{recipe:<16} {blocks} blocks  peak {found['peak'] / 2**30:.2f} GiB "
                    f" {each:.1f} s a block, {found['seconds']:.0f} s in all, from {started}  peak"
                    f" {growth:.3f}×, time {slower:.2f}× of {first['count']:.0f} blocks",
                    flush=True,
                )
                for what in ("within", "after") if sys.platform == "linux" else ():
                    print(
                        f"    {what} each block, GiB:"
                        f" {' '.join(f'{size / 2**30:.2f}' for size in found[what])}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
