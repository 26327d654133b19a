"""What the massive token at the start of a window costs, and what takes that cost away.

    python benchmarks/sink_tokens.py MODEL --calibration train.txt --text test.txt
    [--recipe best-w4a4] [--samples 16] [--seqlen 512] [--limit 24] [--only steps,exact]

Perplexity over the original's, and average steps: of the recipe as it is; with more steps for
massive tokens (``activations.token_steps``); and with the first token of every window kept exact,
in K and V (as PrefixQuant keeps a prefix), in the inputs of linear layers, in both. What is exact
is so while the model is converted and while it is measured, so that weights are fitted to it.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn

import spikellm
from spikellm.evaluation.perplexity import perplexity_of_windows, text_windows
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.linear import SpikingLinear

ROWS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "plain": ("as it is", (), ()),
    "steps": ("8 steps for massive tokens", ("activations.token_steps=8",), ()),
    "near": (
        "8 steps for tokens beyond twice the median",
        ("activations.token_steps=8", "activations.token_factor=2"),
        (),
    ),
    "heads": (
        "8 steps for massive tokens, in K and V too",
        (
            "activations.token_steps=8",
            "attention.key.token_steps=8",
            "attention.value.token_steps=8",
        ),
        (),
    ),
    "prefix": ("first token exact in K and V", (), ("key", "value")),
    "linears": ("first token exact in linear layers", (), ("input",)),
    "exact": ("first token exact in both and in Q", (), ("query", "key", "value", "input")),
}


@contextmanager
def first_token_exact(parts: tuple[str, ...], seqlen: int) -> Iterator[None]:
    """While this holds, the first token of every window is not coded in these parts."""
    through, values, output = (
        SpikingAttention._through,
        InputCoder.values,
        SpikingLinear._output,
    )
    weights: weakref.WeakKeyDictionary[SpikingLinear, Tensor] = weakref.WeakKeyDictionary()

    def attention(self: SpikingAttention, part: str, coder: Any, x: Tensor) -> Tensor:
        coded = through(self, part, coder, x)
        if part in parts:
            coded = coded.clone()
            coded[:, :, 0] = x[:, :, 0].float()
        return coded

    def fitted(self: InputCoder, x: Tensor) -> Tensor:  # all tokens of whole windows, or a sample
        coded = values(self, x)
        if "input" in parts and len(x) % seqlen == 0:
            coded[::seqlen] = x[::seqlen]
        return coded

    def linear(self: SpikingLinear, x: Tensor) -> Tensor:
        y = output(self, x)
        if "input" in parts and x.dim() == 3:
            if self not in weights:
                weights[self] = self.dense_weight()
            bias = None if self.bias is None else self.bias.float()
            y = y.clone()
            y[:, 0] = nn.functional.linear(x[:, 0].float(), weights[self], bias).to(y.dtype)
        return y

    with (
        mock.patch.object(SpikingAttention, "_through", attention),
        mock.patch.object(InputCoder, "values", fitted),
        mock.patch.object(SpikingLinear, "_output", linear),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipe", default="best-w4a4")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--only", default=",".join(ROWS))
    chosen = parser.parse_args()
    model, tokenizer = spikellm.load(chosen.model)
    windows = text_windows(model, tokenizer, chosen.text, seqlen=chosen.seqlen, limit=chosen.limit)
    original = perplexity_of_windows(model, windows).value
    print("| what | average steps | ratio |\n|---|---|---|", flush=True)
    for key in chosen.only.split(","):
        words, settings, parts = ROWS[key]
        model, _ = spikellm.load(chosen.model)
        with first_token_exact(parts, chosen.seqlen):
            result = spikellm.convert(
                model,
                tokenizer,
                chosen.recipe,
                chosen.calibration,
                samples=chosen.samples,
                seqlen=chosen.seqlen,
                settings=settings,
            )
            ratio = perplexity_of_windows(model, windows).value / original
        print(f"| {words} | {result.summary.average_steps:.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
