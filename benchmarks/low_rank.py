"""Low rank beside codes: every linear layer of the blocks as two layers in a row, both coded,
against codes alone at equal stored bits.

    python benchmarks/low_rank.py MODEL CALIBRATION TEST [--inputs 16] [--seeds 2,3,4]
    [--samples 64] [--seqlen 256] [--limit N] [--uncoded] [--json FILE]

A layer keeps a share of its parameters: rank r of n × m becomes n × r and r × m. The factors are a
truncated SVD of the weight, or of the weight times the Cholesky factor of its inputs' second
moments, which is nearest in the layer's output. Both are then fitted as any layer is, by GPTQ with
searched ranges; with ``--inputs`` below 16 a neuron between the two turns the outputs of the first
into spikes. ``--uncoded`` measures the factors alone, without codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spikellm
from spikellm.data.windows import random_windows
from spikellm.models.families import find_blocks, linear_layers
from spikellm.models.swap import replace_module
from spikellm.nn.execution import spiking_linears

ALGORITHM = "algorithm={name: gptq, search_range: true, compensate: true, descents: 12}"
SHARES = ((1.0, 2), (0.75, 3), (0.55, 4), (0.28, 8))
"""Share of parameters that is kept, and bits of a code: all about 2.3 to 2.5 stored bits."""
_DAMPING = 0.01


def moments_of(model: Any, layers: dict[str, nn.Module], windows: Tensor) -> dict[str, Tensor]:
    """``XᵀX`` of the inputs of every layer, float64 ``(in, in)``."""
    found: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            found[name] = found.get(name, 0) + (x.T @ x).double()

        return hook

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for window in windows:
            model(window.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return found


def factored(layer: Any, share: float, moments: Tensor | None) -> nn.Sequential:
    """Two layers that keep a share of the parameters of one.

    Args:
        moments: ``XᵀX`` of its inputs; None for a plain SVD.
    """
    weight = layer.weight.detach().double()
    outputs, inputs = weight.shape
    rank = max(1, min(int(share * outputs * inputs / (outputs + inputs)), outputs, inputs))
    root = torch.eye(inputs, dtype=torch.float64)
    if moments is not None:
        damped = moments + _DAMPING * moments.diagonal().mean() * root
        root = torch.linalg.cholesky(damped)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    half = values[:rank].sqrt()
    first = torch.linalg.solve_triangular(
        root, half.unsqueeze(1) * right[:rank], upper=False, left=False
    )
    one = nn.Linear(inputs, rank, bias=False)
    two = nn.Linear(rank, outputs, bias=layer.bias is not None)
    one.weight.data = first.to(layer.weight.dtype)
    two.weight.data = (left[:, :rank] * half).to(layer.weight.dtype)
    if layer.bias is not None:
        two.bias.data = layer.bias.detach().clone()
    return nn.Sequential(one, two).requires_grad_(False)


class Runs:
    """Conversions and measurements of one command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def perplexity(self, model: Any, tokenizer: Any) -> float:
        own = self.arguments
        return spikellm.perplexity(
            model, tokenizer, own.test, seqlen=own.seqlen, limit=own.limit
        ).value

    def once(self, share: float, bits: int, weighted: bool, seed: int) -> tuple[float, float]:
        """Perplexity and stored bits for each of the original weights."""
        own = self.arguments
        model, tokenizer = spikellm.load(own.model)
        blocks = find_blocks(model)
        layers = {
            f"{blocks.name}.{index}.{name}": layer
            for index, block in enumerate(blocks.modules)
            for name, layer in linear_layers(block).items()
        }
        weights = sum(layer.weight.numel() for layer in layers.values())  # type: ignore[misc]
        if share < 1:
            text = Path(own.calibration).read_text(encoding="utf-8")
            tokens = torch.tensor(tokenizer(text)["input_ids"])
            windows = random_windows(tokens, own.seqlen, own.samples, seed, own.calibration)
            moments = moments_of(model, layers, windows) if weighted else {}
            for name, layer in layers.items():
                replace_module(model, name, factored(layer, share, moments.get(name)))
        if own.uncoded:
            return self.perplexity(model, tokenizer), 16 * share
        spikellm.convert(
            model,
            tokenizer,
            "gptq-w2a16",
            own.calibration,
            samples=own.samples,
            seqlen=own.seqlen,
            seed=seed,
            settings=[
                ALGORITHM,
                f"weights={{format: affine, bits: {bits}, group_size: 64, scale_bits: 16}}",
                f"activations={{bits: {own.inputs}}}",
            ],
        )
        stored = 8 * sum(layer.weight_bytes for layer in spiking_linears(model).values())
        return self.perplexity(model, tokenizer), stored / weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration", "test"):
        parser.add_argument(name)
    parser.add_argument("--inputs", type=int, default=16, help="bits of inputs; 16: not coded")
    parser.add_argument("--seeds", default="2,3,4")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--uncoded", action="store_true", help="the factors alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs, rows = Runs(arguments), {}
    original = runs.perplexity(*spikellm.load(arguments.model))
    print(f"original {original:.2f}", flush=True)
    for share, bits in SHARES:
        for weighted in (True, False) if share < 1 else (True,):
            if arguments.uncoded and share == 1:
                continue
            done = [
                runs.once(share, bits, weighted, seed)
                for seed in map(int, arguments.seeds.split(","))
            ]
            ratios = [perplexity / original for perplexity, _ in done]
            spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
            kind = "codes alone" if share == 1 else "weighted SVD" if weighted else "plain SVD"
            name = f"{kind}, {share:.0%} of parameters" + (
                "" if arguments.uncoded else f", {bits} bits"
            )
            rows[name] = {"ratios": ratios, "stored bits": done[0][1]}
            print(
                f"{name:<50} {done[0][1]:6.2f} stored bits  {statistics.fmean(ratios):8.3f} ±"
                f" {spread:.3f}",
                flush=True,
            )
    if arguments.json:
        found = {"original": original, "variants": rows}
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
