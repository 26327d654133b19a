"""Learnable equivalent transforms (LET): a channel between two layers is divided by s on one side
and multiplied by s on the other.

    norm → q, k, v      x' = norm(x)/s,  W' = W·s            norm → gate, up   likewise
    v → o               V rows / s, O columns · s; one s for each key-value channel, repeated for
    the query heads that share it up → down           up rows / s, down columns · s q ↔ k
    Q rows · s, K rows / s; the two dimensions that rotary embedding mixes share one s

A pair says which parameters of a block are divided and which multiplied (:class:`Scaling`), and how
s is spread over them. Before use every pair is checked in full precision with random scales
(:func:`holds`); one that changes the block's output is dropped and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikellm.quantization.ste import scale_weight

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
    """A channel-wise scaling that cancels: ``length`` scales, the parameters they touch, and the
    layers whose inputs they divide.
    """

    name: str
    length: int
    scalings: tuple[Scaling, ...]
    consumers: tuple[str, ...] = ()


class Factors(NamedTuple):
    """What a parameter is multiplied by, along its rows (or as a vector) and along its columns.

    None for 1.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    offset: float = 0.0

    def applied(self, parameter: Tensor) -> Tensor:
        """The parameter after scaling, differentiable in the factors."""
        if self.offset:
            parameter = parameter + self.offset
        scaled = (
            parameter * self.rows
            if parameter.dim() == 1 and self.rows is not None
            else scale_weight(parameter, self.rows, self.columns)
        )
        return scaled - self.offset if self.offset else scaled


def factors_of(pairs: list[Pair], scales: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Factors of every parameter that pairs touch, all pairs together.

    ``scales`` are positive, ``(length,)``, by name of pair.
    """
    found: dict[str, Factors] = {}
    for pair in pairs:
        scale = scales[pair.name]
        ways = {1: scale, -1: 1 / scale}
        for parameter, axis, power, spread, offset in pair.scalings:
            factor = ways[power][spread]
            rows, columns, _ = found.get(parameter, Factors())
            if axis == 0:
                rows = factor if rows is None else rows * factor
            else:
                columns = factor if columns is None else columns * factor
            found[parameter] = Factors(rows, columns, offset)
    return found


def apply_pairs(
    state: Mapping[str, Tensor], pairs: list[Pair], scales: Mapping[str, Tensor]
) -> State:
    """Parameters after the scaling of all pairs; others are passed on as they are."""
    return {
        **state,
        **{
            name: factors.applied(state[name])
            for name, factors in factors_of(pairs, scales).items()
        },
    }


@torch.no_grad()
def holds(
    block: nn.Module, pair: Pair, run: Callable[[nn.Module, State], Tensor], seed: int
) -> bool:
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
    scale = torch.exp2(torch.rand(pair.length, generator=generator) * 2 - 1).to(
        next(iter(state.values()))
    )
    expected, found = run(block, state), run(block, apply_pairs(state, [pair], {pair.name: scale}))
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


def smooth_scale(input_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's scale ``max|x|^α / max|W|^(1−α)``, normalised to a geometric mean of 1.

    1 for dead channels.

    Args:
        input_max: largest magnitude of each channel, ``(length,)``.
        weight_max: largest magnitude of the columns that read it.
    """
    scale = input_max.clamp(min=1e-5) ** alpha / weight_max.clamp(min=1e-5) ** (1 - alpha)
    scale = scale / scale.log().mean().exp()
    return torch.where((input_max > 0) & (weight_max > 0), scale, torch.ones_like(scale)).clamp(
        1e-4, 1e4
    )
