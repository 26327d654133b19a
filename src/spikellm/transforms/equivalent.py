"""Learnable equivalent transforms (LET): a channel between two layers is divided by s on one side and multiplied by s on the other.

    norm → q, k, v      x' = norm(x)/s,  W' = W·s            norm → gate, up   likewise
    v → o               V rows / s, O columns · s; one s for each key-value channel, repeated for the query heads that share it
    up → down           up rows / s, down columns · s
    q ↔ k               Q rows · s, K rows / s; the two dimensions that rotary embedding mixes share one s

A pair says which parameters of a block are divided and which multiplied (:class:`Scaling`), and how s is spread over them. Before use every pair is
checked in full precision with random scales (:func:`holds`); one that changes the block's output is dropped and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Scaling(NamedTuple):
    """One parameter that a pair scales.

    Attributes:
        parameter: name within the block.
        axis: 0 for rows (or a vector), 1 for columns.
        power: −1 to divide by s, +1 to multiply.
        spread: ``s[spread]`` spreads s over the axis.
        offset: the parameter acts as ``offset + parameter`` (1 for norms with ``1 + w``).
    """

    parameter: str
    axis: int
    power: int
    spread: Tensor
    offset: float = 0.0


class Pair(NamedTuple):
    """A channel-wise scaling that cancels: ``length`` scales, the parameters they touch, and the layers whose inputs they divide."""

    name: str
    length: int
    scalings: tuple[Scaling, ...]
    consumers: tuple[str, ...] = ()


def apply_pair(state: Mapping[str, Tensor], pair: Pair, scale: Tensor) -> State:
    """Parameters after a pair's scaling, differentiable in ``scale`` (positive, ``(length,)``); others are passed on as they are."""
    result = dict(state)
    for parameter, axis, power, spread, offset in pair.scalings:
        factor = scale[spread] if power > 0 else 1 / scale[spread]
        if axis == 0 and result[parameter].dim() == 2:
            factor = factor.unsqueeze(1)
        result[parameter] = (result[parameter] + offset) * factor - offset
    return result


def apply_pairs(state: Mapping[str, Tensor], pairs: list[Pair], scales: Mapping[str, Tensor]) -> State:
    """All pairs, one after the other."""
    result = dict(state)
    for pair in pairs:
        result = apply_pair(result, pair, scales[pair.name])
    return result


@torch.no_grad()
def holds(block: nn.Module, pair: Pair, run: Callable[[nn.Module, State], Tensor], seed: int) -> bool:
    """Whether a pair leaves a block's function as it is.

    Args:
        block: float32 or float64 block.
        run: output of the block with the given parameters in the place of its own.
        seed: of the random scales, spread over 1/2 … 2.
    """
    state: State = {name: parameter.detach() for name, parameter in block.named_parameters()}
    if any(scaling.parameter not in state for scaling in pair.scalings):
        return False
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.rand(pair.length, generator=generator) * 2 - 1).to(next(iter(state.values())))
    expected, found = run(block, state), run(block, apply_pair(state, pair, scale))
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


def smooth_scale(input_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's scale ``max|x|^α / max|W|^(1−α)``, normalised to a geometric mean of 1; 1 for dead channels.

    Args:
        input_max: largest magnitude of each channel, ``(length,)``.
        weight_max: largest magnitude of the columns that read it.
    """
    scale = input_max.clamp(min=1e-5) ** alpha / weight_max.clamp(min=1e-5) ** (1 - alpha)
    scale = scale / scale.log().mean().exp()
    return torch.where((input_max > 0) & (weight_max > 0), scale, torch.ones_like(scale)).clamp(1e-4, 1e4)
