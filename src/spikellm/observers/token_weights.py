"""How much each token weighs where tokens are summed or averaged.

Real language models make one token of a window, most often its first, massive: its hidden state is
a hundred times as large as all others (attention sinks), and its square ten thousand times. A sum
of squares over tokens (a Hessian, a cross moment, an energy by which scales and rotations are
chosen) is then a statement about that token alone, and what is fitted to it loses on all the
others.

Every token is coded in ranges of its own, so that its error grows with its size: weighing a token
is the same as scaling it. ``robust`` scales those whose norm is above the median down to the
median's, so that none weighs more than an ordinary one; smaller ones stay as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

TokenWeights = Literal["equal", "robust"]


class SamplePlan(NamedTuple):
    """Which tokens of a text are sampled, and how much they weigh.

    Attributes:
        seen: tokens that will pass in all.
        wanted: tokens to keep at most.
        before: tokens of the text that other ranks run, in front of those that pass here.
        weights: see :mod:`spikellm.observers.token_weights`.
        widths: whether the widths of the ranges of all tokens are kept too.
    """

    seen: int
    wanted: int
    before: int = 0
    weights: TokenWeights = "equal"
    widths: bool = False


def token_scale(x: Tensor, weights: TokenWeights) -> Tensor | None:
    """What to multiply tokens by before they enter a sum, float32 ``(tokens, 1)``; None for ones.

    Args:
        x: ``(tokens, channels)``, of one batch of windows: the median is over these.
    """
    if weights == "equal" or len(x) == 0:
        return None
    norms = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    scale: Tensor = norms.median() / norms.clamp(min=1e-30)
    return scale.clamp(max=1.0)


def weighed(x: Tensor, weights: TokenWeights) -> Tensor:
    """Tokens ``(tokens, channels)`` as they enter a sum, float32."""
    scale = token_scale(x, weights)
    return x.float() if scale is None else x.float() * scale
