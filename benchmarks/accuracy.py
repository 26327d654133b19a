"""What each ingredient of the most accurate presets gives: alone, and taken away from all.

And which error is left.

    python benchmarks/accuracy.py MODEL --calibration train.txt --text test.txt [--samples 64]
    [--seeds 2,3,4] [--limit 60] [--only remove]

Perplexity over the original's. Three tables in Markdown: ``add`` puts ingredients on plain W4A4 (a
4-bit cache, round to nearest) one at a time, ``remove`` takes them from ``best-w4a4`` one at a
time, ``sources`` gives one part after the other of ``best-w4a4`` 8 bits, so that its error is gone.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import spikellm

_PLAIN = "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}"
_GPTQ = ("algorithm=gptq", "algorithm.search_range=true")
_BEHIND = "{name: online-rotation, layers: [attention-input, feedforward-input, output, down]}"
_ALL = {  # transforms of best-w4a4
    "norm-equalization": "norm-equalization",
    "value-centering": "value-centering",
    "equalization": "equalization",
    "value-output-rotation": "{name: value-output-rotation, basis: balanced}",
    "online-rotation": _BEHIND.replace("}", ", choose: loss, center: true}"),
}


def _without(transform: str) -> str:
    return _with(transform, None)


def _with(transform: str, entry: str | None) -> str:
    """The transforms of the preset with another entry in the place of one, or none."""
    entries = {**_ALL, transform: entry}
    return f"transforms=[{', '.join(one for one in entries.values() if one is not None)}]"


ADD: dict[str, tuple[str, ...]] = {
    "plain (round to nearest)": (),
    "rotated residual stream": ("transforms=[residual-rotation]",),
    "rotated V": ("transforms=[value-output-rotation]",),
    "rotated before o and down": ("transforms=[online-rotation]",),
    "rotated before o and down, equalized": ("transforms=[equalization, online-rotation]",),
    "rotated before all layers": (f"transforms=[{_BEHIND}]",),
    "rotated before all layers, equalized": (
        f"transforms=[norm-equalization, equalization, {_BEHIND}]",
    ),
    "searched input ranges": ("activations.search_range=true",),
    "rotated Q and K": ("attention.rotate=true",),
    "centered K": ("attention.center=true",),
    "own ranges for 5% of the channels": ("activations.salient_rate=0.05",),
    "two steps and own ranges for 10%": (
        "activations.salient_rate=0.10",
        "activations.salient_steps=2",
    ),
    "GPTQ, searched ranges": _GPTQ,
    "GPTQ that compensates": (*_GPTQ, "algorithm.compensate=true"),
}
REMOVE: dict[str, tuple[str, ...]] = {
    "everything": (),
    "all tokens weigh the same": ("calibration.token_weights=equal",),
    "rotated residual stream instead of rotations behind norms": (
        "transforms=[residual-rotation, equalization, value-output-rotation,"
        " {name: online-rotation, choose: loss}]",
    ),
    "no equalized norms": (_without("norm-equalization"),),
    "no rotated V": (_without("value-output-rotation"),),
    "no rotation before layers": (_without("online-rotation"),),
    "no equalization between layers": (_without("equalization"),),
    "all of each input's range": ("activations.search_range=false",),
    "no rotated Q and K": ("attention.rotate=false", "attention.balance=false"),
    "no balanced Q and K": ("attention.balance=false",),
    "no centered K": ("attention.center=false",),
    "no balanced V": (_with("value-output-rotation", "value-output-rotation"),),
    "no centered V": (_without("value-centering"),),
    "no centered inputs": (_with("online-rotation", _BEHIND.replace("}", ", choose: loss}")),),
    "no compensation": ("algorithm.compensate=false",),
    "no coordinate descent": ("algorithm.descents=0",),
    "no searched ranges of weights": ("algorithm.search_range=false",),
    "with own ranges for 5% of the channels": ("activations.salient_rate=0.05",),
    "with two steps and own ranges for 10%, the same in every layer": (
        "activations.salient_rate=0.10",
        "activations.salient_steps=2",
    ),
    "with two steps for 10%, shared out over the model": (
        "activations={bits: 4, search_range: true, salient_rate: 0.10, salient_steps: 2,"
        " allocation: model}",
    ),
}
SOURCES: dict[str, tuple[str, ...]] = {
    "everything": (),
    "weights at 8 bits": ("weights.bits=8",),
    "inputs of linear layers at 8 bits": ("activations.bits=8",),
    "Q at 8 bits": ("attention.query.bits=8",),
    "K at 8 bits": ("attention.key.bits=8",),
    "V at 8 bits": ("attention.value.bits=8",),
}
TABLES = {
    "add": ("rtn-w4a4", (_PLAIN,), ADD),
    "remove": ("best-w4a4", (), REMOVE),
    "sources": ("best-w4a4", (), SOURCES),
}


def _perplexity(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> float:
    limit, seqlen = arguments.limit, arguments.seqlen
    return spikellm.perplexity(model, tokenizer, arguments.text, limit=limit, seqlen=seqlen).value


def ratio(
    arguments: argparse.Namespace,
    preset: str,
    settings: tuple[str, ...],
    seed: int,
    original: float,
) -> float:
    """Perplexity of one conversion over the original's."""
    model, tokenizer = spikellm.load(arguments.model)
    spikellm.convert(
        model,
        tokenizer,
        preset,
        arguments.calibration,
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        settings=settings,
        seed=seed,
    )
    return _perplexity(model, tokenizer, arguments) / original


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", default="2")
    parser.add_argument("--seqlen", type=int, help="tokens of a window")
    parser.add_argument("--limit", type=int, help="windows of the text; all by default")
    parser.add_argument("--only", choices=TABLES)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    model, tokenizer = spikellm.load(arguments.model)
    original = _perplexity(model, tokenizer, arguments)
    print(
        f"{arguments.model}: {original:.2f}; {arguments.samples} calibration windows, seeds"
        f" {arguments.seeds}, {arguments.limit or 'all'} windows of the text"
    )
    for name in [arguments.only] if arguments.only else TABLES:
        preset, always, rows = TABLES[name]
        print(f"\n| {name}: `{preset}` | ratio |\n|---|---|", flush=True)
        for label, settings in rows.items():
            found = [
                ratio(arguments, preset, (*always, *settings), seed, original) for seed in seeds
            ]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            print(f"| {label} | {statistics.mean(found):.3f}{spread} |", flush=True)


if __name__ == "__main__":
    main()
