"""Massive tokens: those whose own range is far above that of all others (attention sinks, most
often the first token of a window). They take more steps, and so finer codes, in every channel.

A token is massive if its largest value less its smallest, zero included, is beyond a threshold that
was fixed at conversion. That needs neither its position nor any other token, so it is found while
the model runs, token by token, and the same in every execution mode and on every backend.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.quantization.thresholds import token_range


class MassiveTokens(NamedTuple):
    """Which tokens of a tensor are massive, and what they take.

    Attributes:
        steps: T of every channel of a massive token.
        beyond: the width of its range beyond which a token is massive, a float32 number.
        share: of the tokens that were seen at conversion, how many are massive.
    """

    steps: int
    beyond: float
    share: float

    def steps_of(self, x: Tensor, steps: int) -> Tensor:
        """Steps T of every token, int64 ``(..., 1)``.

        Args:
            x: float32, ``(..., channels)``, all channels of each token.
            steps: T of ordinary tokens.
        """
        return torch.where(is_beyond(range_width(x), self.beyond), self.steps, steps)


def range_width(x: Tensor) -> Tensor:
    """Largest less smallest value of each token, zero included: ``(..., channels)`` float32 gives
    ``(..., 1)``; not finite where the token is not, or the difference overflows.
    """
    low, high = token_range(x)
    return high - low


def is_beyond(width: Tensor, beyond: Tensor | float) -> Tensor:
    """Whether tokens with ranges of these widths are massive; those that are not finite are not."""
    return (width > beyond) & (width < math.inf)


def find_massive(widths: Tensor, steps: int, factor: float, rate: float) -> MassiveTokens | None:
    """What makes a token massive, from the tokens of a text.

    Args:
        widths: :func:`range_width` of every token, float32, ``(tokens,)``.
        steps: T of a massive token.
        factor: a token is massive beyond this many times the median.
        rate: the share of tokens that may be; the threshold is raised until no more are.

    Returns:
        None where no token is massive.
    """
    if len(widths) == 0:
        return None
    beyond = factor * widths.median()
    most = int(rate * len(widths))
    found = widths[is_beyond(widths, float(beyond))].sort(descending=True).values
    if len(found) > most:
        beyond, found = found[most], found[:most]
        found = found[found > beyond]
    if len(found) == 0:
        return None
    return MassiveTokens(steps, float(beyond), len(found) / len(widths))
