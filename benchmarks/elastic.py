"""What training makes of elastic spikes: perplexity before and after all weights are distilled from
the original, by neuron and number of steps.

    python benchmarks/elastic.py MODEL CALIBRATION TEXT [--neurons elastic:1,elastic:4,ternary:4]
    [--updates 300] [--batch 2] [--seqlen 256] [--rate 5e-4] [--limit 30] [--seed 2]

Inputs of the linear layers of all blocks become spikes, thresholds are twice the mean magnitude of
a token (SpikeLM's amplitude), and weights stay floating point. Products are taken in bfloat16 while
training. Every neuron sees the same windows in the same order.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.nn.fake_quant import FakeQuantLinear, InputCoder
from spikellm.recipe import ActivationRecipe


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tokens(model: str, text: str) -> Tensor:
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))
    return torch.tensor(encoded["input_ids"])


def spiking(path: str, neuron: str, steps: int) -> Any:
    """The model with coded inputs in all linear layers but the head."""
    model, settings = (
        load(path),
        ActivationRecipe(bits=2, neuron=neuron, symmetric=True, steps=steps, threshold_from="mean"),
    )
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head:
            own = FakeQuantLinear(layer.weight, layer.bias)
            own.coder = InputCoder(settings, torch.zeros(layer.in_features, dtype=torch.uint8))
            own.weight.requires_grad_()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, own)
    return model


def set_precision(model: Any, dtype: torch.dtype) -> None:
    for layer in model.modules():
        if isinstance(layer, FakeQuantLinear):
            layer.precision = dtype


@torch.no_grad()
def perplexity(model: Any, text: Tensor, seqlen: int, limit: int) -> float:
    total = 0.0
    for window in text[: limit * seqlen].view(limit, 1, seqlen):
        logits = model(window).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return math.exp(total / (limit * (seqlen - 1)))


def train(model: Any, original: Any, text: Tensor, options: argparse.Namespace) -> None:
    """AdamW on all weights, towards the original's next-token distribution."""
    set_precision(model, torch.bfloat16)
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    for update in range(options.updates):
        starts = torch.randint(0, len(text) - options.seqlen, (options.batch,), generator=generator)
        windows = torch.stack([text[start : start + options.seqlen] for start in starts.tolist()])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = original(windows).logits.float().log_softmax(-1)
        found = model(windows).logits.float().log_softmax(-1)
        loss = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
        cosine = 0.5 * (1 + math.cos(math.pi * update / options.updates))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, (update + 1) / 20) * (0.05 + 0.95 * cosine)
        optimizer.zero_grad()
        (loss / windows.numel()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    set_precision(model, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--neurons", default="elastic:4,elastic-published:4,elastic:1")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    original, test = load(options.model).eval(), tokens(options.model, options.text)
    calibration = tokens(options.model, options.calibration)
    size = (test, options.seqlen, options.limit)
    print(f"original: {perplexity(original, *size):.2f}", flush=True)
    for one in options.neurons.split(","):
        neuron, steps = one.split(":")
        model, start = spiking(options.model, neuron, int(steps)), time.perf_counter()
        before = perplexity(model, *size)
        train(model, original, calibration, options)
        print(
            f"{neuron}, T = {steps}: {before:.1f} before, {perplexity(model, *size):.2f} after"
            f" {options.updates} updates ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
