"""What maps before coding could give, from second moments alone: expected squared error of what
layers give when their inputs are coded, relative to that behind scales and a rotation
(``norm-equalization`` or ``equalization``, then ``online-rotation``).

    centered    the mean of each channel taken away too
    Kronecker   the best pair of small matrices (FlatQuant), by turns
    full        the best matrix of all (``spikellm.quantization.balance``)

    python benchmarks/coding_bounds.py MODELS/smollm2-135m --text TEXT/wikitext-2/train.txt
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import spikellm
from spikellm.evaluation.perplexity import text_windows
from spikellm.models.families import block_roles, find_blocks, site_layers, weight_and_bias
from spikellm.observers.token_weights import token_scale
from spikellm.quantization.balance import balanced_map

SITES = ("attention-input", "output", "feedforward-input", "down")


class Moments:
    """Second moments of what a site reads, and its mean, tokens weighed so that none rules."""

    def __init__(self) -> None:
        self.square: Tensor = torch.zeros(())
        self.total: Tensor = torch.zeros(())
        self.weight = 0.0

    def take(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().flatten(0, -2).float()
        scale = token_scale(x, "robust")
        assert scale is not None
        scaled = (x * scale).double()
        self.square = self.square + scaled.T @ scaled
        self.total = self.total + (scaled * scale).sum(0)
        self.weight += float(scale.square().sum())

    def centered(self) -> Tensor:
        return self.square - torch.outer(self.total, self.total) / self.weight


def scales(moments: Tensor, energy: Tensor) -> float:
    """Least loss behind a scale for each channel and a rotation."""
    return float((moments.diagonal() * energy.diagonal()).clamp(min=0).sqrt().sum()) ** 2


def behind(one: Tensor, moments: Tensor, energy: Tensor) -> float:
    """Loss behind a map and a rotation."""
    back = torch.linalg.inv(one)
    return float(torch.trace(one @ moments @ one.T) * torch.trace(back.T @ energy @ back))


def kronecker(moments: Tensor, energy: Tensor, rounds: int = 6) -> float:
    """Loss behind scales and the best Kronecker pair, each factor the best beside the other."""
    scale = (moments.diagonal() / energy.diagonal()).clamp(min=1e-12) ** 0.25
    moments, energy = moments / torch.outer(scale, scale), energy * torch.outer(scale, scale)
    size = len(moments)
    small = next(one for one in range(math.isqrt(size), 0, -1) if size % one == 0)
    shape = (size // small, small) * 2
    four, other = moments.reshape(shape), energy.reshape(shape)
    left = torch.eye(shape[0], dtype=torch.float64)
    right = torch.eye(small, dtype=torch.float64)
    for _ in range(rounds):
        square, back = right @ right, torch.linalg.inv(right @ right)
        left = balanced_map(
            torch.einsum("abcd,bd->ac", four, square), torch.einsum("abcd,bd->ac", other, back)
        )
        square, back = left @ left, torch.linalg.inv(left @ left)
        right = balanced_map(
            torch.einsum("abcd,ac->bd", four, square), torch.einsum("abcd,ac->bd", other, back)
        )
    return behind(torch.kron(left, right), moments, energy)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--every", type=int, default=4, help="look at every so many blocks")
    args = parser.parse_args()
    model, tokenizer = spikellm.load(args.model, dtype="float32")
    windows = text_windows(model, tokenizer, args.text, seqlen=args.seqlen, limit=args.samples)
    blocks = find_blocks(model).modules
    seen: dict[tuple[int, str], Moments] = {}
    for index in range(1, len(blocks), args.every):
        roles = block_roles(blocks[index])
        for site in SITES:
            names = site_layers(roles, site)
            if names:
                moments = seen[index, site] = Moments()
                take: Callable[..., None] = partial(moments.take)
                blocks[index].get_submodule(names[0]).register_forward_pre_hook(take)
    for window in windows:
        model(torch.as_tensor(window).view(1, -1), use_cache=False)
    print("| block | site | centered | Kronecker | full |\n|---|---|---|---|---|")
    for (index, site), moments in seen.items():
        names = site_layers(block_roles(blocks[index]), site)
        weights = [weight_and_bias(blocks[index].get_submodule(name))[0] for name in names]
        weight = torch.cat(weights).double()
        energy, least = weight.T @ weight, 0.0
        least = scales(moments.square, energy)
        found = (
            scales(moments.centered(), energy),
            kronecker(moments.square, energy),
            behind(balanced_map(moments.square, energy), moments.square, energy),
        )
        print(f"| {index} | {site} |", " | ".join(f"{one / least:.2f}" for one in found), "|")


if __name__ == "__main__":
    main()
