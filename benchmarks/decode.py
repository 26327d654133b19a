"""Whole models of real shape: prompt and decode of converted models beside their bfloat16 original,
and llama.cpp where its llama-bench is named, in one run.

    python benchmarks/decode.py [--shape 160m,1b] [--recipes w4a4-t2,ternary-1.0] [--threads 1]
    [--prompt 32] [--new 32] [--repeat 3] [--settings vocabulary.bits=8] [--llama-bench PROGRAM]
    [--keep DIR]

Weights are random (speed does not depend on them); the shapes are those of Llama models of 160
million and 1 billion parameters. Each model is converted with one window of random tokens, saved,
and run in a process of its own, in turns with the others (see ``spikellm bench``). Prints medians
and ratios. llama.cpp runs the original at the types next to the recipe's, written with the ``gguf``
package: ternary layers as TQ2_0, others as Q4_1 or with ``--gguf-type q4_0``; embedding and output
projection at 16 bits unless the settings code them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
import transformers

import spikellm
from spikellm.commands.bench import BenchOptions, bench, show
from spikellm.commands.support.llama_bench import LlamaBenchOptions, chosen_types, write_apart
from spikellm.recipe.load import load_recipe

SHAPES = {
    "160m": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def make(shape: str, folder: Path) -> None:
    """A model of random weights with the tokenizer of the bundled one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Path(spikellm.__file__).parent / "assets" / "stdlib-2m"
    )
    config = transformers.LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=True, **SHAPES[shape]
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def converted(original: Path, out: Path, arguments: argparse.Namespace, recipe: str) -> None:
    """Convert with random tokens: weights are random, so no fit is better than another."""
    words = out.parent / "words.txt"
    vocabulary = ["return", "the", "value", "of", "list", "a", "file"]
    words.write_text(" ".join(random.Random(0).choices(vocabulary, k=4000)))  # noqa: S311
    ternary = load_recipe(recipe).weights.format == "ternary"
    settings = [*(["algorithm.rounds=1"] if ternary else []), *arguments.settings]
    model, tokenizer = spikellm.load(original)
    spikellm.convert(model, tokenizer, recipe, str(words), samples=1, seqlen=64, settings=settings)
    spikellm.save(model, tokenizer, out)


def file_for(out: Path, original: Path, arguments: argparse.Namespace) -> Path | None:
    """The file that llama.cpp runs beside a converted model; None where it does not run."""
    if arguments.llama_bench is None:
        return None
    types = chosen_types(str(out), LlamaBenchOptions(gguf_type=arguments.gguf_type))
    file = original.parent / f"{original.name}-{types.layers}-{types.vocabulary}.gguf"
    if not file.exists():
        print(f"{file.name}: matrices by type {write_apart(str(original), file, types)}")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="160m", help=f"of {', '.join(SHAPES)}, or several")
    parser.add_argument("--recipes", default="w4a4-t2,ternary-1.0")
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--llama-bench", metavar="PROGRAM", help="time this of llama.cpp beside")
    parser.add_argument("--gguf-type", help="of the layers in the file that llama.cpp runs")
    parser.add_argument(
        "--keep", type=Path, help="keep the models in this folder, and use those that it holds"
    )
    arguments = parser.parse_args()
    shapes = arguments.shape.split(",")
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))} (valid: {', '.join(SHAPES)})")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for shape in shapes:
            original = folder / shape
            if not original.exists():
                make(shape, original)
            for recipe in arguments.recipes.split(","):
                out = folder / "-".join([shape, recipe, *arguments.settings])
                if not out.exists():
                    converted(original, out, arguments, recipe)
                turns = BenchOptions(
                    original=str(original),
                    prompt_tokens=arguments.prompt,
                    new_tokens=arguments.new,
                    repeat=arguments.repeat,
                    threads=arguments.threads,
                    llama_bench=arguments.llama_bench,
                    gguf=file_for(out, original, arguments),
                )
                show(bench(str(out), turns))


if __name__ == "__main__":
    main()
