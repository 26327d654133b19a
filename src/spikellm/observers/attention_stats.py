"""Which channels of K and V are salient: what is sampled of attention, and how groups are chosen
from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from spikellm.models.attention_interface import Observation, observing
from spikellm.observers.head_moments import HeadMoments
from spikellm.observers.input_stats import TokenSample
from spikellm.observers.token_weights import SamplePlan, TokenWeights

ATTENTION_TOKENS = 2048  # tokens from which channels of K and V are ranked
_PARTS = ("query", "key", "value", "value_gradient")
_AS_THEY_CAME = ("key_as_it_came", "value_as_it_came")


class AttentionSample:
    """Token samples of Q, K, V and of ``PᵀPV`` of attention modules, heads side by side: ``(tokens,
    heads·channels)``; where the plan keeps widths, K and V not weighed too.

    Args:
        modules: attention modules by name.
        sampled: names of those whose tokens are sampled; of all of them moments are taken.

    Attributes:
        moments: by name.
    """

    def __init__(
        self, modules: dict[str, nn.Module], plan: SamplePlan, sampled: Collection[str]
    ) -> None:
        self._names = {module: name for name, module in modules.items()}
        self.moments = {name: HeadMoments() for name in modules}
        plain = plan._replace(weights=TokenWeights(), widths=False)
        plans = dict.fromkeys(_PARTS, plan._replace(widths=False))
        plans |= dict.fromkeys(_AS_THEY_CAME if plan.widths else (), plain)
        self._samples = {
            name: {part: TokenSample(own) for part, own in plans.items()} for name in sampled
        }

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Samples of a module by part, None if its tokens are not sampled."""
        if name not in self._samples:
            return None
        return {part: sample.tokens() for part, sample in self._samples[name].items()}

    def all_gather(self) -> None:
        """Take over what other ranks saw."""
        for parts in self._samples.values():
            for sample in parts.values():
                sample.all_gather()
        for moments in self.moments.values():
            moments.all_reduce()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While this holds, every pass through the modules is sampled."""

        def observe(module: nn.Module, seen: Observation) -> None:
            name = self._names.get(module)
            if name is None:
                return
            self.moments[name].update(seen)
            if name not in self._samples:
                return
            groups = seen.query.shape[1] // seen.key.shape[1]
            gradient = (
                seen.weights.float().transpose(2, 3) @ seen.output.float()
            )  # PᵀPV of every query head
            gradient = gradient.unflatten(1, (-1, groups)).sum(2)
            values = (seen.query, seen.key, seen.value, gradient, seen.key, seen.value)
            for part, x in zip((*_PARTS, *_AS_THEY_CAME), values, strict=True):
                if part in (samples := self._samples[name]):
                    samples[part].update(x.transpose(1, 2).flatten(2))

        with observing(observe):
            yield
