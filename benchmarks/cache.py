"""Decode attention over a long cache: rows of spikes on native kernels beside bfloat16 keys and
values with torch's scaled dot product attention.

    python benchmarks/cache.py [--tokens 1024,4096] [--heads 32] [--shared 4] [--channels 64]
    [--layers 16] [--threads 1] [--repeat 20]

One step is what a decoder layer does for one new token: the token goes into the cache, its queries
attend to all of it. The cache classes and attention functions are the library's own and ours, as
models call them. There are as many layers as the option says, taken in turn, so that no cache is
found in the processor's caches; contenders take turns; medians. Prints time of a layer and step,
bytes of the cache, and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spikellm.kernels import describe
from spikellm.models.attention_interface import CHILD, spike_attention
from spikellm.models.cache import SpikingLayer
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.recipe import ActivationRecipe, AttentionRecipe

T2 = ActivationRecipe(
    bits=4, salient_rate=0.1, salient_steps=2, saliency="first-order", thresholds="shared"
)
ONE = ActivationRecipe(bits=4)
RECIPES = {
    "spikes, T = 1": AttentionRecipe(query=ONE, key=ONE, value=ONE),
    "spikes, T = 2 on 10%": AttentionRecipe(query=ONE, key=T2, value=T2),
}


class Layer(nn.Module):
    """What the attention functions ask of a decoder layer, with a cache of random tokens."""

    def __init__(
        self, tokens: int, heads: int, shared: int, channels: int, recipe: AttentionRecipe | None
    ) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.config = shared, True, SimpleNamespace()
        self.layer_idx = 0
        self.function: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward
        self.cache = DynamicLayer()
        if recipe is not None:
            spikes = SpikingAttention(HeadShape(heads, channels, channels), recipe)
            for part, group in (("key", spikes.key_group), ("value", spikes.value_group)):
                settings: ActivationRecipe = getattr(recipe, part)
                group[:, : round(settings.salient_rate * channels)] = 1
            setattr(self, CHILD, spikes)
            self.cache, self.function = SpikingLayer(spikes), spike_attention
        for start in range(0, tokens, 1024):
            new = torch.randn(
                2, 1, heads, min(1024, tokens - start), channels, dtype=torch.bfloat16
            )
            self.cache.update(new[0], new[1])

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One new token: ``(1, heads, 1, channels)`` each."""
        keys, values = self.cache.update(key, value)
        return self.function(self, query, keys, values, None, scaling=query.shape[-1] ** -0.5)[0]

    @property
    def cache_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in (self.cache.keys, self.cache.values)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--shared", type=int, default=4, help="query heads to a key-value head")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    own = arguments.heads // arguments.shared
    print(
        f"{arguments.heads} heads of {arguments.channels} channels, {own} of keys and values,"
        f" {arguments.threads} thread(s), kernels: {describe()}"
    )
    for tokens in map(int, arguments.tokens.split(",")):
        with torch.no_grad():
            contenders: dict[str, list[Layer]] = {}
            for name, recipe in {"bfloat16": None, **RECIPES}.items():
                size = (tokens, own, arguments.shared, arguments.channels)
                contenders[name] = [Layer(*size, recipe) for _ in range(arguments.layers)]
            spent: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(-2, arguments.repeat):
                query = torch.randn(1, arguments.heads, 1, arguments.channels, dtype=torch.bfloat16)
                key, value = torch.randn(2, 1, own, 1, arguments.channels, dtype=torch.bfloat16)
                for name, layers in contenders.items():
                    started = time.perf_counter()
                    for layer in layers:
                        layer.step(query, key, value)
                    if turn >= 0:
                        spent[name].append((time.perf_counter() - started) / len(layers))
            base, whole = (
                statistics.median(spent["bfloat16"]),
                contenders["bfloat16"][0].cache_bytes,
            )
            print(f"\n{tokens} tokens")
            for name, layers in contenders.items():
                took, held = statistics.median(spent[name]), layers[0].cache_bytes
                print(
                    f"{name:<24} {took * 1e3:8.3f} ms   {base / took:5.2f}× bfloat16  "
                    f" {held / 2**20:7.2f} MiB   {held / whole:.3f} of bfloat16"
                )


if __name__ == "__main__":
    main()
