"""How much each token weighs where tokens are summed or averaged.

Real language models make one token of a window, most often its first, massive: its hidden state is
a hundred times as large as all others (attention sinks), and its square ten thousand times. A sum
of squares over tokens (a Hessian, a cross moment, an energy by which scales and rotations are
chosen) is then a statement about that token alone, and what is fitted to it loses on all the
others.

Every token is coded in ranges of its own, so that its error grows with its size: weighing a token
is the same as scaling it. ``robust`` scales those whose norm is above the median down to the
median's, so that none weighs more than an ordinary one; smaller ones stay as they are.

The opposite holds for tokens that open every window alike, a BOS token above all: the same state in
every window, to which all others attend. It is a single point in the space of a layer's inputs, one
direction out of hundreds; nothing is lost by fitting it well, and everything behind it by fitting
it badly. Where weights are fitted it counts as much as so many ordinary tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spikellm.data.shards import WindowShard
from spikellm.recipe.calibration import CalibrationRecipe

Rule = Literal["equal", "robust"]


class TokenWeights(NamedTuple):
    """How much tokens weigh in sums.

    Attributes:
        rule: for all tokens.
        seqlen: tokens of a window.
        opening: how many at the start of a window are the same in all windows.
        opening_scale: what those are multiplied by where weights are fitted.
    """

    rule: Rule = "equal"
    seqlen: int = 1
    opening: int = 0
    opening_scale: float = 1.0

    @classmethod
    def of(cls, recipe: CalibrationRecipe, shard: WindowShard) -> TokenWeights:
        """As a recipe asks for, on these windows."""
        return cls(
            recipe.token_weights, shard.windows.shape[1], shard.opening, recipe.opening_weight**0.5
        )

    def scale(self, x: Tensor, *, fitted: bool = False) -> Tensor | None:
        """What to multiply tokens by before they enter a sum, float32 ``(tokens, 1)``; None for
        ones.

        Args:
            x: ``(tokens, channels)``, of one batch of windows: the median is over these.
            fitted: the sum is one that weights are fitted by.
        """
        found = token_scale(x, self.rule)
        if not fitted or not self.stresses_opening:
            return found
        return self.stressed(torch.ones(len(x), 1, device=x.device) if found is None else found)

    @property
    def stresses_opening(self) -> bool:
        """Whether tokens that open every window alike weigh more where weights are fitted."""
        return self.opening > 0 and self.opening_scale != 1.0

    def stressed(self, x: Tensor) -> Tensor:
        """Tokens, or what they are multiplied by, ``(tokens, ...)``, as weights are fitted by
        them.
        """
        if not self.stresses_opening:
            return x
        found = x.clone()
        found.unflatten(0, (-1, self.seqlen))[:, : self.opening] *= self.opening_scale
        return found


class SamplePlan(NamedTuple):
    """Which tokens of a text are sampled, and how much they weigh.

    Attributes:
        seen: tokens that will pass in all.
        wanted: tokens to keep at most.
        before: tokens of the text that other ranks run, in front of those that pass here.
        weights: how much tokens weigh.
        widths: whether the widths of the ranges of all tokens are kept too.
    """

    seen: int
    wanted: int
    before: int = 0
    weights: TokenWeights = TokenWeights()
    widths: bool = False


def token_scale(x: Tensor, rule: Rule) -> Tensor | None:
    """What to multiply tokens by before they enter a sum, float32 ``(tokens, 1)``; None for ones.

    Args:
        x: ``(tokens, channels)``, of one batch of windows: the median is over these.
    """
    if rule == "equal" or len(x) == 0:
        return None
    norms = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    scale: Tensor = norms.median() / norms.clamp(min=1e-30)
    return scale.clamp(max=1.0)


def weighed(x: Tensor, rule: Rule) -> Tensor:
    """Tokens ``(tokens, channels)`` as they enter a sum, float32."""
    scale = token_scale(x, rule)
    return x.float() if scale is None else x.float() * scale
