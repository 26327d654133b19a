"""What coding K and V of a block loses, by how many of their channels take more steps: measured at
what attention gives, before any block is converted.

    loss = E[Σ_o s_o · (y_o − ŷ_o)²],   s_o = E[(∂loss/∂y_o)²]

y is what the attention module gives when nothing is coded, ŷ when K or V alone is. Channels of K
and V that take more steps are taken to lower it evenly, which a rotation makes true, and which is
the least that a choice of channels gains.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.conversion.attention import part_name, set_center_and_map
from spikellm.conversion.spike_prices import mean_spikes, prices_of
from spikellm.core.distributed import sum_scalar
from spikellm.models.attention_interface import CHILD, Observation, observing
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.observers.head_moments import HeadMoments
from spikellm.recipe import ActivationRecipe, AttentionRecipe

PARTS = ("key", "value")
_NOT_CODED = ActivationRecipe(bits=16)


class SurveyedHeads(NamedTuple):
    """K or V of one attention module, to be coded.

    Attributes:
        name: of the module, and the part.
        settings: of the part.
        channels: of one head.
        losses: where no channel takes more steps, and where all do.
        cost: bit operations a token of the product that the part enters, at one step a channel, for
            each bit of the part.
        products: multiply-accumulates a token of that product.
        priced: what coding at each of some prices loses, and takes; nothing where spikes have none.
    """

    name: str
    settings: ActivationRecipe
    channels: int
    losses: tuple[float, float]
    cost: int
    products: int = 0
    priced: PricedLosses | None = None


class PricedLosses(NamedTuple):
    """Prices of a spike that were tried, and of each the loss and the spikes a value, float64
    ``(prices,)``.
    """

    prices: list[float]
    losses: Tensor
    spikes: Tensor


@dataclass
class AttentionCalls:
    """Calls of attention modules, kept to be made again.

    Attributes:
        modules: attention modules by name.
        wanted: which calls, counted from 0 for each module, are kept.
    """

    modules: Mapping[str, nn.Module]
    wanted: Container[int]
    kept: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While this holds, calls are kept."""
        seen = dict.fromkeys(self.modules, 0)

        def keep(name: str) -> Callable[..., None]:
            def before(module: nn.Module, arguments: tuple[Any, ...], keywords: Any) -> None:
                if seen[name] in self.wanted:
                    self.kept.setdefault(name, []).append((arguments, dict(keywords)))
                seen[name] += 1

            return before

        handles = [
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class HeadLosses:
    """Measures what coding K and V of one attention module loses.

    Attributes:
        name: of the module.
        shape, settings: of its heads, and how they are to be coded.
        module: uncoded.
        calls: of the module, to be made again.
        sensitivity: of what it gives, ``(hidden,)``.
    """

    name: str
    shape: HeadShape
    settings: AttentionRecipe
    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    sensitivity: Tensor

    @torch.no_grad()
    def measure(self) -> Iterator[SurveyedHeads]:
        """The parts whose steps or spikes are shared out."""
        moments, products = HeadMoments(), 0
        kept: dict[str, Tensor] = {}

        def observe(module: nn.Module, seen: Observation) -> None:
            nonlocal products
            moments.update(seen)
            products = seen.query.shape[1] * seen.key.shape[2]
            kept.update(key=seen.key, value=seen.value)

        with observing(observe):
            exact = list(self._outputs())
        moments.all_reduce()
        for part in PARTS:
            own: ActivationRecipe = getattr(self.settings, part)
            if not (own.allocated_over_model or own.spikes):
                continue
            other = self.settings.query if part == "key" else self.settings.probabilities
            channels = self.shape.key_channels if part == "key" else self.shape.value_channels
            few = self._loss(part, moments, exact, 0)
            many = self._loss(part, moments, exact, 1) if own.allocated_over_model else few
            cost = products * channels
            priced = self._priced(part, moments, kept[part], few) if own.spikes else None
            name = part_name(self.name, part)
            yield SurveyedHeads(name, own, channels, (few, many), cost * other.bits, cost, priced)

    def _outputs(self) -> Iterator[Tensor]:
        for arguments, keywords in self.calls:
            given = self.module(*arguments, **keywords)
            yield (given[0] if isinstance(given, tuple) else given).float()

    def _loss(self, part: str, moments: HeadMoments, exact: list[Tensor], group: int) -> float:
        """Mean over tokens, with all channels of one part in one group and the others uncoded."""
        spikes = self._coding(part, moments)
        groups = [torch.full_like(one, group) for one in (spikes.key_group, spikes.value_group)]
        spikes.set_groups(*groups)
        self.module.add_module(CHILD, spikes)
        try:
            lost = [
                float(((given - wanted).square() * self.sensitivity).sum(dtype=torch.float64))
                for given, wanted in zip(self._outputs(), exact, strict=True)
            ]
        finally:
            del self.module._modules[CHILD]
        tokens = sum(one[..., 0].numel() for one in exact)
        return sum_scalar(sum(lost)) / sum_scalar(tokens)

    def _coding(self, part: str, moments: HeadMoments) -> SpikingAttention:
        """What codes one part alone."""
        others = {"query", "probabilities", *PARTS} - {part}
        plain: dict[str, object] = dict.fromkeys(others, _NOT_CODED)
        if part == "value":
            plain |= {"center": False, "rotate": False, "balance": False}
        spikes = SpikingAttention(
            self.shape, self.settings.model_copy(update=plain), self.sensitivity.device
        )
        if part == "key":
            set_center_and_map(spikes, moments)
        return spikes

    def _priced(self, part: str, moments: HeadMoments, x: Tensor, loss: float) -> PricedLosses:
        """What coding a part loses and takes at each of some prices.

        ``loss`` is that without a price; it is taken to grow as the part's own squared error does.
        """
        own: ActivationRecipe = getattr(self.settings, part)
        spikes = self._coding(part, moments)
        if part == "key":
            x = spikes.turned_key(x)
        errors, taken, prices = [], [], prices_of(own)
        for price in prices:
            spikes.set_price(part, price)
            coder = spikes.key_coder() if part == "key" else spikes.value_coder()
            coded = coder.encode(x)
            errors.append(float((coder.decode(coded) - x).square().sum(dtype=torch.float64)))
            taken.append(mean_spikes(own, coded.codes - coder.baselines(coded)))
        tokens = x[..., 0].numel()
        lost = [sum_scalar(error) for error in errors]
        losses = [loss * error / max(lost[0], torch.finfo(torch.float32).tiny) for error in lost]
        share = [sum_scalar(one * tokens) / sum_scalar(tokens) for one in taken]
        return PricedLosses(
            prices,
            torch.tensor(losses, dtype=torch.float64),
            torch.tensor(share, dtype=torch.float64),
        )
