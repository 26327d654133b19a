"""Which channels of K and V are salient: what is sampled of attention, and how groups are chosen
from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from spikellm.models.attention_interface import Observation, observing, watching_heads
from spikellm.observers.input_stats import TokenSample
from spikellm.observers.token_weights import SamplePlan

ATTENTION_TOKENS = 2048  # tokens from which channels of K and V are ranked
_PARTS = ("query", "key", "value", "value_gradient")


class AttentionSample:
    """Token samples of Q, K, V and of ``PᵀPV`` of attention modules, heads side by side: ``(tokens,
    heads·channels)``.

    Args:
        keys_only: sample K alone, which takes less time.
    """

    def __init__(
        self, modules: dict[str, nn.Module], plan: SamplePlan, *, keys_only: bool = False
    ) -> None:
        self._names = {module: name for name, module in modules.items()}
        self._keys_only = keys_only
        parts = ("key",) if keys_only else _PARTS
        self._samples = {name: {part: TokenSample(plan) for part in parts} for name in modules}

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return {part: sample.tokens() for part, sample in self._samples[name].items()}

    def all_gather(self) -> None:
        """Take over what other ranks saw."""
        for parts in self._samples.values():
            for sample in parts.values():
                sample.all_gather()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While this holds, every pass through the modules is sampled."""

        def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
            self._update(module, key=key)

        def observe(module: nn.Module, seen: Observation) -> None:
            if module not in self._names:
                return
            groups = seen.query.shape[1] // seen.key.shape[1]
            gradient = (
                seen.weights.float().transpose(2, 3) @ seen.output.float()
            )  # PᵀPV of every query head
            gradient = gradient.unflatten(1, (-1, groups)).sum(2)
            self._update(
                module, query=seen.query, key=seen.key, value=seen.value, value_gradient=gradient
            )

        with watching_heads(watch) if self._keys_only else observing(observe):
            yield

    def _update(self, module: nn.Module, **parts: Tensor) -> None:
        """Take what was seen of a module, ``(batch, heads, tokens, channels)`` each."""
        if module in self._names:
            for part, x in parts.items():
                self._samples[self._names[module]][part].update(x.transpose(1, 2).flatten(2))
