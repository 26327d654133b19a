"""The basis of the residual stream in which readers lose least: learned, and fused like any other
rotation of it.

A norm divides by a length that no rotation R changes, so behind it R may stand, and then a gain for
every channel (:func:`spikellm.transforms.equalization.even_scale`). What a reader then loses
follows the product of :mod:`spikellm.quantization.balance` for a diagonal map,

    (Σ_i ((Rᵀ C R)_ii · (Rᵀ G R)_ii)^½)²

C the second moments of the normalised stream and G those of the readers' weights. The mean of its
logarithm over norms of the model is made small by Adam on skew matrices K, R ← R·cayley(K)
(SpinQuant, OSTQuant), from moments alone: no pass through the model is needed beyond the one that
takes them. K leaves the constant vector alone, so that layer normalisation commutes with R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core import distributed
from spikellm.models.families import weight_and_bias
from spikellm.observers.token_weights import weighed
from spikellm.transforms.fusion import OFFSETS, readers_of_norms

_SITES = 16  # norms that are looked at
_STEPS = 60
_RATE = 2.5e-3
_DECAYS = 0.9, 0.99  # of Adam's moments


class Site(NamedTuple):
    """Second moments of the normalised stream in front of readers, and of their weights, ``(width,
    width)`` each, of trace 1.
    """

    moments: Tensor
    energy: Tensor


class Passed(NamedTuple):
    """A block in full precision, and what runs it once on a sample of the calibration text."""

    module: nn.Module
    run: Callable[[], object]


def sites_of(blocks: Iterable[Passed], width: int, count: int, *, centered: bool) -> list[Site]:
    """Moments at the norms of some of ``count`` blocks, evenly spread.

    Args:
        blocks: all of them, in order.
        width: channels of the stream.
        centered: take the mean away from the stream.
    """
    every, found = max(1, -(-2 * count // _SITES)), list[Site]()
    for index, block in enumerate(blocks):
        if index % every:
            block.run()
            continue
        moments: dict[str, _Moments] = {}
        handles = [
            module.register_forward_hook(partial(_look, moments, name))
            for name, module in block.module.named_modules()
            if type(module).__name__.endswith("Norm")
        ]
        try:
            seen = readers_of_norms(block.module, block.run, width)
        finally:
            for handle in handles:
                handle.remove()
        for norm, readers in seen.items():
            if readers and norm in moments:
                found.append(moments[norm].site(block.module, norm, readers, centered=centered))
    return found


class _Moments:
    """Sums over what a norm gives."""

    def __init__(self) -> None:
        self.square: Tensor | None = None
        self.total: Tensor | None = None
        self.tokens = 0
        self.sample: Tensor | None = None

    def update(self, output: Tensor) -> None:
        x = weighed(output.detach().flatten(0, -2), "robust")
        square, total = (x.T @ x).double(), x.sum(0).double()
        self.square = square if self.square is None else self.square + square
        self.total = total if self.total is None else self.total + total
        self.tokens += len(x)
        self.sample = output.detach().flatten(0, -2)[:64].double()

    def site(self, block: nn.Module, norm: str, readers: Iterable[str], *, centered: bool) -> Site:
        assert self.square is not None
        assert self.total is not None
        assert self.sample is not None
        distributed.all_reduce(self.square)
        distributed.all_reduce(self.total)
        count = torch.tensor([float(self.tokens)], dtype=torch.float64, device=self.total.device)
        distributed.all_reduce(count)
        moments, mean = self.square / count, self.total / count
        if centered:
            moments = moments - torch.outer(mean, mean)
        gain = _gain(block.get_submodule(norm), self.sample)
        inverse = torch.where(gain == 0, 0.0, 1 / gain)
        moments = moments * inverse[:, None] * inverse
        energy = torch.zeros_like(moments)
        for name in readers:
            weight = weight_and_bias(block.get_submodule(name))[0].detach().double() * gain
            energy += weight.T @ weight
        return Site(moments / moments.trace(), energy / energy.trace())


def _look(
    moments: dict[str, _Moments], name: str, module: nn.Module, arguments: object, output: object
) -> None:
    if isinstance(output, Tensor):
        moments.setdefault(name, _Moments()).update(output)


def _gain(norm: nn.Module, sample: Tensor) -> Tensor:
    """Gains of a norm, float64 ``(width,)``; whether they are ``w`` or ``1 + w`` is told by what
    the norm gave: divided by its gains every token has the same length.
    """
    weight = norm._parameters.get("weight")
    if weight is None:
        return torch.ones(sample.shape[-1], dtype=torch.float64, device=sample.device)
    bias = norm._parameters.get("bias")
    bare = sample if bias is None else sample - bias.detach().double()
    gains = [weight.detach().double() + offset for offset in OFFSETS]

    def spread(gain: Tensor) -> float:
        lengths = torch.where(gain == 0, 0.0, bare / gain).norm(dim=-1)
        return float(lengths.std() / lengths.mean().clamp(min=1e-300))

    return min(gains, key=spread)


def mean_loss(sites: list[Site], basis: Tensor) -> Tensor:
    """Mean logarithm of what readers lose in a basis ``(width, width)``, up to a constant; in the
    basis's type.
    """
    losses = [
        2
        * ((moments @ basis * basis).sum(0) * (energy @ basis * basis).sum(0))
        .clamp(min=1e-30)
        .sqrt()
        .sum()
        .log()
        for moments, energy in ((part.to(basis.dtype) for part in site) for site in sites)
    ]
    return torch.stack(losses).mean()


@torch.enable_grad()
def learn_basis(sites: list[Site], start: Tensor) -> Tensor:
    """An orthogonal matrix that leaves the constant vector alone, float64 ``(width, width)``.

    Args:
        start: such a matrix, from which it is learned.
    """
    basis, width = start.float(), len(start)
    single = [Site(*(part.float() for part in site)) for site in sites]
    identity = torch.eye(width, device=basis.device)
    first, second = torch.zeros_like(identity), torch.zeros_like(identity)
    for step in range(_STEPS):
        basis.requires_grad_(True)
        (gradient,) = torch.autograd.grad(mean_loss(single, basis), basis)
        basis = basis.detach()
        skew = basis.T @ gradient
        skew = _without_constant(skew - skew.T)
        first = _DECAYS[0] * first + (1 - _DECAYS[0]) * skew
        second = _DECAYS[1] * second + (1 - _DECAYS[1]) * skew.square()
        even = (second / (1 - _DECAYS[1] ** (step + 1))).sqrt() + 1e-8
        move = first / (1 - _DECAYS[0] ** (step + 1)) / even * _RATE * (1 - step / _STEPS)
        move = _without_constant(move) / 2
        basis = basis @ torch.linalg.solve(identity + move, identity - move)
    left, _, right = torch.linalg.svd(basis.double())
    nearest: Tensor = left @ right
    return nearest


def _without_constant(skew: Tensor) -> Tensor:
    """The part of a skew matrix that leaves the constant vector alone."""
    skew = skew - skew.mean(0, keepdim=True)
    return skew - skew.mean(1, keepdim=True)
