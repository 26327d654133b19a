"""How a token is chosen from logits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_COLDEST = 1e-4  # what is colder takes the likeliest


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: only the likeliest tokens that have this much probability together.
        top_k: only so many of the likeliest tokens; 0 for all.
        presence_penalty: taken off the logits of tokens that were generated already.
        frequency_penalty: taken off for every time that they were.
        bias: added to the logits of single tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def choose(self, logits: Tensor, seen: Counter[int], generator: torch.Generator) -> int:
        """A token from its logits ``(vocabulary,)``.

        Args:
            seen: tokens that were generated before, with how often.
            generator: decides what is sampled, on the CPU.
        """
        scores = self._changed(logits.detach().float().cpu(), seen)
        if self.temperature < _COLDEST:
            return int(scores.argmax())
        scores = (scores - scores.max()) / self.temperature
        if 0 < self.top_k < len(scores):
            kept, places = scores.topk(self.top_k)
            scores = torch.full_like(scores, -math.inf).scatter_(0, places, kept)
        probabilities = scores.softmax(0)
        if self.top_p < 1:
            probabilities = _nucleus(probabilities, self.top_p)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def _changed(self, scores: Tensor, seen: Counter[int]) -> Tensor:
        penalized = seen and (self.presence_penalty or self.frequency_penalty)
        if not (penalized or self.bias):
            return scores
        scores = scores.clone()
        if penalized:
            tokens = torch.tensor(list(seen))
            times = torch.tensor(list(seen.values()), dtype=scores.dtype)
            scores[tokens] -= self.presence_penalty + self.frequency_penalty * times
        if self.bias:
            scores.index_add_(0, *self._biases)
        return scores

    @cached_property
    def _biases(self) -> tuple[Tensor, Tensor]:
        """Tokens and what is added to each, float32."""
        return torch.tensor(list(self.bias)), torch.tensor(
            [float(one) for one in self.bias.values()]
        )


def _nucleus(probabilities: Tensor, share: float) -> Tensor:
    """The likeliest tokens until they have a share of the probability; the others have none."""
    kept, places = probabilities.sort(descending=True, stable=True)
    before = kept.cumsum(0) - kept
    before[0] = -1.0  # the likeliest stays, however small the share
    return torch.zeros_like(probabilities).scatter_(0, places, kept.where(before < share, 0.0))


@dataclass(frozen=True)
class TokenLogprob:
    """Logarithm of the probability that the model gives a token, and the likeliest ones beside it.

    Probabilities are the model's own, before temperature, penalties and biases.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprob_of(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """What the model's logits ``(vocabulary,)`` say of a token and its ``top`` likeliest rivals."""
    found = logits.detach().float().log_softmax(0)
    values, places = found.topk(min(top, len(found)))
    likeliest = zip(places.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token, float(found[token]), tuple(likeliest))
