"""What coding a model's input embedding and output projection costs: perplexity, mean
Kullback-Leibler divergence of next-token probabilities from the same model uncoded, bytes, and the
time of the projection for one token. The rest of the model, converted or not, stays as it is.

    python benchmarks/vocabulary.py MODEL --text test.txt --bits 8,6 --groups 0,64 --limit 16
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import spikellm
from spikellm.conversion.vocabulary import code_vocabulary
from spikellm.evaluation.perplexity import text_windows
from spikellm.models.swap import replace_module
from spikellm.models.vocabulary import plan_vocabulary
from spikellm.nn.vocabulary import CodedEmbedding, CodedHead, CodedTable
from spikellm.recipe import VocabularyRecipe


def coded(model: Any, settings: VocabularyRecipe) -> dict[str, nn.Module]:
    """Coded modules by name; the model keeps its own."""
    sites = plan_vocabulary(model, settings)
    own = {name: model.get_submodule(name) for name in sites.modules}
    code_vocabulary(model, sites, settings)
    found = {name: model.get_submodule(name) for name in own}
    put(model, own)
    return found


def put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        replace_module(model, name, module)


def table_bytes(modules: dict[str, nn.Module]) -> int:
    tables: set[CodedTable] = set()
    tensors: dict[int, int] = {}
    for module in modules.values():
        if isinstance(module, (CodedEmbedding, CodedHead)):
            tables.add(module.table)
        else:
            tensors[module.weight.data_ptr()] = module.weight.nbytes
    return sum(table.weight_bytes for table in tables) + sum(tensors.values())


@torch.no_grad()
def losses(model: Any, window: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities of a window, and the summed loss of its tokens."""
    found = model(window.view(1, -1), use_cache=False).logits[0].float().log_softmax(-1)
    return found, -float(found[:-1].gather(1, window[1:, None]).sum(dtype=torch.float64))


@torch.no_grad()
def head_times(
    model: Any, variants: dict[str, dict[str, nn.Module]], repeat: int
) -> dict[str, float]:
    """Milliseconds of the processor that the projection of one token takes, contenders in turn."""
    width = model.get_input_embeddings().weight.shape[1]
    x = torch.randn(1, width, dtype=model.dtype)
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-2, repeat):
        for name, modules in variants.items():
            put(model, modules)
            head = model.get_output_embeddings()
            started = time.process_time()
            head(x)
            if turn >= 0:
                spent[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(times) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", default="8,6")
    parser.add_argument("--groups", default="0", help="channels of a group, 0 for whole rows")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--dtype", default="auto", help="type of what stays, float32 for example")
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    model, tokenizer = spikellm.load(args.model, dtype=args.dtype)
    windows = text_windows(model, tokenizer, args.text, seqlen=args.seqlen, limit=args.limit)
    texts = [torch.as_tensor(window) for window in windows]
    variants: dict[str, dict[str, nn.Module]] = {}
    for bits in map(int, args.bits.split(",")):
        for group in map(int, args.groups.split(",")):
            settings = VocabularyRecipe(bits=bits, group_size=group or None)
            variants[f"{bits} bits, {f'groups of {group}' if group else 'rows'}"] = coded(
                model, settings
            )
    own = {name: model.get_submodule(name) for name in next(iter(variants.values()))}
    variants = {f"{8 * model.dtype.itemsize} bits (as it is)": own, **variants}
    total = dict.fromkeys(variants, 0.0)
    far = dict.fromkeys(variants, 0.0)
    tokens = 0
    for window in texts:
        tokens += len(window) - 1
        for name, modules in variants.items():
            put(model, modules)
            found, loss = losses(model, window)
            if modules is own:
                exact = found
            total[name] += loss
            far[name] += float((exact.exp() * (exact - found)).sum(dtype=torch.float64))
    took = head_times(model, variants, args.repeat)
    print(f"{args.model}, {tokens} tokens\n")
    print("| table | bytes | perplexity | change | divergence | head of a token, ms |")
    print("|---|---|---|---|---|---|")
    first = next(iter(total.values()))
    for name, modules in variants.items():
        change = math.exp((total[name] - first) / tokens) - 1
        print(
            f"| {name} | {table_bytes(modules) / 1e6:.2f} MB | {math.exp(total[name] / tokens):.4f}"
            f" | {change:+.4%} | {far[name] / tokens:.3g} | {took[name]:.3f} |"
        )


if __name__ == "__main__":
    main()
