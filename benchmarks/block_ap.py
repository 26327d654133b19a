"""What learning block by block gives, from round to nearest and from GPTQ, and what it is worth to
have the spikes in the loop.

    python benchmarks/block_ap.py MODEL --calibration train.txt --text test.txt [--samples 64]
    [--blocks 2] [--limit 20] [--epochs 4]

Perplexity over the original's, with the first blocks converted and the others as they were; 2-bit
weights in groups of 64, and ternary ones of 1.4 steps.
"""

from __future__ import annotations

import argparse
from typing import Any

import spikellm
from spikellm.algorithms import block_ap
from spikellm.models.families import find_blocks

_GPTQ = "{name: gptq, search_range: true, compensate: true}"
_W2 = ("weights={bits: 2, group_size: 64}",)
_TERNARY = ("weights={format: ternary, budget: 1.4}",)
_ROBUST = ("calibration.token_weights=robust", "calibration.opening_weight=256")
_A4 = ("activations={bits: 4, search_range: true}", *_ROBUST)

ROWS: dict[str, tuple[str, tuple[str, ...], bool]] = {  # start, settings, coded in the loop
    "W2A16 from round to nearest": ("rtn", _W2, True),
    "W2A16 from GPTQ": (_GPTQ, _W2, True),
    "W2A4 from GPTQ, spikes in the loop": (_GPTQ, (*_W2, *_A4), True),
    "W2A4 from GPTQ, learned at A16": (_GPTQ, (*_W2, *_A4), False),
    "ternary from GPTQ": ("{name: gptq, compensate: true}", (*_TERNARY, *_ROBUST), True),
}


def main() -> None:
    """A table in Markdown: the start, and what is learned from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    base = _perplexity(given, ())
    print("| | start | learned |\n|---|---|---|")
    for name, (start, settings, coded) in ROWS.items():
        ratios = [
            _perplexity(given, (f"algorithm={_algorithm(start, epochs)}", *settings), coded=coded)
            / base
            for epochs in (0, given.epochs)
        ]
        print(f"| {name} | {ratios[0]:.4f} | {ratios[1]:.4f} |", flush=True)


def _algorithm(start: str, epochs: int) -> str:
    return f"{{name: block-ap, epochs: {epochs}, start: {start}}}"


def _perplexity(
    given: argparse.Namespace, settings: tuple[str, ...], *, coded: bool = True
) -> float:
    model, tokenizer = spikellm.load(given.model)
    whole = find_blocks(model)
    if settings:
        _convert(given, model, tokenizer, settings, coded=coded)
    owner, _, name = whole.name.rpartition(".")
    first = find_blocks(model).modules
    setattr(model.get_submodule(owner), name, type(first)([*first, *whole.modules[len(first) :]]))
    model.config.num_hidden_layers = len(whole.modules)
    return float(
        spikellm.perplexity(
            model, tokenizer, given.text, seqlen=given.seqlen, limit=given.limit
        ).value
    )


def _convert(
    given: argparse.Namespace, model: Any, tokenizer: Any, settings: tuple[str, ...], *, coded: bool
) -> None:
    """Convert the first blocks alone; where they are not ``coded``, they learn on inputs as they
    are.
    """
    owner, _, name = find_blocks(model).name.rpartition(".")
    kept = find_blocks(model).modules[: given.blocks]
    setattr(model.get_submodule(owner), name, kept)
    model.config.num_hidden_layers = len(kept)
    coders = block_ap.input_coders
    if not coded:
        block_ap.input_coders = lambda _, layers: dict.fromkeys(layers)
    try:
        spikellm.convert(
            model,
            tokenizer,
            "rtn-w2a16",
            given.calibration,
            samples=given.samples,
            seqlen=given.seqlen,
            settings=settings,
        )
    finally:
        block_ap.input_coders = coders


if __name__ == "__main__":
    main()
