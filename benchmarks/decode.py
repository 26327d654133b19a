"""Whole models of real shape: prompt and decode of converted models beside their bfloat16 original,
in one run.

    python benchmarks/decode.py [--shape 160m] [--recipes w4a4-t2,ternary-1.0] [--threads 1]
    [--prompt 32] [--new 32] [--repeat 3] [--keep DIR]

Weights are random (speed does not depend on them); the shapes are those of Llama models of 160
million and 1 billion parameters. Each model is converted with one window of random tokens, saved,
and run in a process of its own, in turns with the original (see ``spikellm bench``). Prints medians
and ratios.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="160m")
    parser.add_argument("--recipes", default="w4a4-t2,ternary-1.0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--keep", type=Path, help="keep the models in this folder, and use those that it holds"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        original = folder / arguments.shape
        if not original.exists():
            make(arguments.shape, original)
        words = folder / "words.txt"
        vocabulary = ["return", "the", "value", "of", "list", "a", "file"]
        words.write_text(" ".join(random.Random(0).choices(vocabulary, k=4000)))  # noqa: S311
        for recipe in arguments.recipes.split(","):
            ternary = load_recipe(recipe).weights.format == "ternary"
            quick = (
                ["algorithm.rounds=1"] if ternary else []
            )  # weights are random: no fit is better than another
            out = folder / f"{arguments.shape}-{recipe}"
            if not out.exists():
                model, tokenizer = spikellm.load(original)
                spikellm.convert(
                    model, tokenizer, recipe, str(words), samples=1, seqlen=64, settings=quick
                )
                spikellm.save(model, tokenizer, out)
                del model
            turns = BenchOptions(
                original=str(original),
                prompt_tokens=arguments.prompt,
                new_tokens=arguments.new,
                repeat=arguments.repeat,
                threads=arguments.threads,
            )
            show(bench(str(out), turns))


if __name__ == "__main__":
    main()
