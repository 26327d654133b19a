"""How one attention module codes Q, K and V: the module that hangs in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.prepared import Transform
from spikellm.kernels.spec import MixSpec, Spec
from spikellm.kernels.torch.heads import HeadCodes
from spikellm.neurons.price import whole_price
from spikellm.nn.head_codec import HeadCoder, head_spec
from spikellm.nn.hooks import SpikeTrain, spike_observer
from spikellm.nn.massive_heads import MassiveHeadCoder
from spikellm.nn.prepared import PreparedModule
from spikellm.nn.rotation import prepare_mix
from spikellm.quantization.ste import pass_through, through_share, within_share
from spikellm.recipe import ActivationRecipe, AttentionRecipe


class HeadShape(NamedTuple):
    """What an attention module works on: key-value heads, channels of a key and of a value head."""

    heads: int
    key_channels: int
    value_channels: int


class SpikingAttention(PreparedModule):
    """How one attention module codes Q, K and V.

    Persistent state: ``key_group`` and ``value_group``, uint8 ``(key-value heads, channels)``, the
    group of every channel; ``key_mean``, float32 of the same shape, where K is centered;
    ``key_map``, float32 ``(key-value heads, channels / 2, 2, 2)``, symmetric, where Q and K are
    balanced;
    ``key_threshold`` and ``value_threshold``, float32 ``(key-value heads,)``, where massive tokens
    take more steps; ``key_price`` and ``value_price``, float32 ``(1,)``, where spikes have a price;
    ``query_share``, ``key_share`` and ``value_share``, float32 ``(1,)``, the part of each range
    that is coded, where that was trained.
    """

    key_group: Tensor
    value_group: Tensor
    key_mean: Tensor
    key_map: Tensor
    prepared = ("_coders", "_mix", "_maps")
    _coders: dict[str, HeadCoder] | None
    _mix: Transform | None
    _maps: tuple[tuple[Tensor, ...], ...] | None

    def __init__(
        self, shape: HeadShape, settings: AttentionRecipe, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.shape, self.settings = shape, settings
        self.register_buffer(
            "key_group",
            torch.zeros(shape.heads, shape.key_channels, dtype=torch.uint8, device=device),
        )
        self.register_buffer(
            "value_group",
            torch.zeros(shape.heads, shape.value_channels, dtype=torch.uint8, device=device),
        )
        if settings.center:
            self.register_buffer(
                "key_mean",
                torch.zeros(shape.heads, shape.key_channels, dtype=torch.float32, device=device),
            )
        if settings.balance:
            identity = torch.eye(2, dtype=torch.float32, device=device)
            pairs = (shape.heads, shape.key_channels // 2, 2, 2)
            self.register_buffer("key_map", identity.expand(pairs).clone())
        for name in ("key", "value"):
            if getattr(settings, name).token_steps:
                none = torch.full((shape.heads,), torch.inf, dtype=torch.float32, device=device)
                self.register_buffer(f"{name}_threshold", none)
        for name in settings.priced_parts:
            free = torch.zeros(1, dtype=torch.float32, device=device)
            self.register_buffer(f"{name}_price", free)

    @torch.no_grad()
    def set_groups(self, key_group: Tensor, value_group: Tensor) -> None:
        """Set the group of every K and V channel."""
        self.key_group.copy_(key_group)
        self.value_group.copy_(value_group)
        self.forget()

    @torch.no_grad()
    def set_price(self, part: str, price: float) -> None:
        """Set the price of a spike of K or V, see :mod:`spikellm.neurons.price`."""
        self.get_buffer(f"{part}_price").fill_(whole_price(price))
        self.forget()

    def price(self, part: str) -> float:
        """The price of a spike of a part; 0 where it has none."""
        found = self._buffers.get(f"{part}_price")
        return 0.0 if found is None else float(found)

    def share(self, part: str) -> float:
        """The part of each range, or multiple of each mean, that is coded of a part."""
        found = self._buffers.get(f"{part}_share")
        return getattr(self.settings, part).coded_share if found is None else float(found.detach())

    def share_ranges(self, part: str) -> Tensor:
        """Let Q, K or V code a part of their ranges that can be trained."""
        whole = torch.full((1,), getattr(self.settings, part).coded_share, dtype=torch.float32)
        self.register_buffer(f"{part}_share", whole.to(self.key_group.device))
        return self.get_buffer(f"{part}_share")

    @property
    def caches(self) -> bool:
        """Whether K and V can live in a cache as spikes: both are coded, token by token."""
        return (
            self.settings.key.spiking
            and self.settings.value.spiking
            and self.settings.key_axis == "token"
        )

    def turned_query(self, query: Tensor) -> Tensor:
        """Q as it is coded, ``(..., query heads, tokens, channels)``: mapped against K, and
        rotated, where the recipe says so.
        """
        return self._turned(self._mapped(query, inverse=True))

    def turned_key(self, key: Tensor) -> Tensor:
        """K as it is coded, ``(..., heads, tokens, channels)``: centered, mapped and rotated, where
        the recipe says so.

        A query's products with all keys lose the same number, which the softmax does not see
        (SageAttention); it is added again only where more than a softmax sees it
        (:meth:`center_scores`).
        """
        if self.settings.center:
            key = key.float() - self.key_mean.unsqueeze(1)
        return self._turned(self._mapped(key))

    def _turned(self, x: Tensor) -> Tensor:
        """Each head's channels rotated among each other, where the recipe says so."""
        if not self.settings.rotate:
            return x
        if self._mix is None:
            self._mix = prepare_mix(x.shape[-1], x.device)
        return self._mix(x.float())

    def _mapped(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Pairs of channels of each head through its map, or through the inverse."""
        if not self.settings.balance:
            return x
        maps = self.maps()[1 if inverse else 0]
        shared = x.shape[-3] // len(self.key_map)
        first, mixed, second = (
            one if shared == 1 else one.repeat_interleave(shared, dim=0) for one in maps
        )
        half = self.key_map.shape[1]
        left, right, odd = x.float().split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat([left * first + right * mixed, left * mixed + right * second, odd], -1)

    def maps(self) -> tuple[tuple[Tensor, ...], ...]:
        """The entries of the maps of K, and of their inverses, for Q: three each, ``(heads, 1,
        channels / 2)``.
        """
        self.forget_if_written()
        if self._maps is None:
            both = self.key_map, torch.linalg.inv(self.key_map.double()).float()
            self._maps = tuple(_entries(one) for one in both)
        return self._maps

    def turned_mean(self) -> Tensor:
        """The mean of K as K is coded, ``(heads, channels)``."""
        return self._turned(self._mapped(self.key_mean.unsqueeze(1)).squeeze(1))

    def center_scores(self, query: Tensor) -> Tensor | float:
        """What every key's score lost when K was centered: products of a query, as it is coded,
        with the mean of K. 0 where K is not centered.

        Args:
            query: ``(batch, heads, queries, channels)``.

        Returns:
            ``(batch, heads, queries, 1)``.
        """
        if not self.settings.center:
            return 0.0
        mean = self.turned_mean().to(query.dtype)
        mean = mean.repeat_interleave(query.shape[1] // len(mean), dim=0)
        return (query * mean.unsqueeze(1)).sum(-1, keepdim=True)

    def key_coder(self) -> HeadCoder:
        """Coder of K, by key-value head."""
        return self._coder("key", self.key_group, self.settings.key_axis)

    def value_coder(self) -> HeadCoder:
        """Coder of V, by key-value head."""
        return self._coder("value", self.value_group, "token")

    def query_coder(self) -> HeadCoder:
        """Coder of Q, one for all heads."""
        return self._coder("query", self._group("query"), "token")

    def specs(self) -> dict[str, Spec]:
        """What kernels are asked for: the coder of each part that is coded, and the rotation of
        heads.
        """
        found: dict[str, Spec] = {}
        for name in ("query", "key", "value", "probabilities"):
            settings: ActivationRecipe = getattr(self.settings, name)
            if settings.spiking:
                axis = self.settings.key_axis if name == "key" else "token"
                group, price, share = self._group(name), self.price(name), self.share(name)
                found[name] = head_spec(settings, group, axis, price, share)
        for name, coder in (("key", self.key_coder), ("value", self.value_coder)):
            if name in found and isinstance(massive := coder(), MassiveHeadCoder):
                found[f"massive {name}"] = massive.wide.spec
        if self.settings.rotate:
            found["rotation"] = MixSpec(self.shape.key_channels)
        return found

    def code(self, name: str, x: Tensor) -> Tensor:
        """Values of Q or of probabilities after coding, one step a channel.

        As they came where they are not coded.
        """
        settings = getattr(self.settings, name)
        if not settings.spiking:
            return x
        coder = (self._coders or {}).get(name)
        if coder is None:
            coder = self._coder(name, self._group(name), "token")
        return self._through(name, coder, x)

    def code_key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """K and V after coding."""
        key = self.turned_key(key)
        if self.settings.key.spiking:
            key = self._through("key", self.key_coder(), key)
        if self.settings.value.spiking:
            value = self._through("value", self.value_coder(), value)
        return key, value

    def show(self, part: str, coder: HeadCoder, coded: HeadCodes) -> None:
        """Show spikes to whoever watches them."""
        if (observer := spike_observer()) is not None:
            steps, baseline = coder.steps_of(coded), coder.baselines(coded)
            observer(SpikeTrain(self, part, coded.codes, baseline, steps, coder.neuron))

    def _through(self, part: str, coder: HeadCoder, x: Tensor) -> Tensor:
        """Values after coding; while training, gradients pass straight through."""
        if spike_observer() is not None:
            coded = coder.encode(x)
            self.show(part, coder, coded)
            return coder.decode(coded)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return coder.fake_quantize(x)
        with torch.no_grad():
            recoded = coder.fake_quantize(x)
        share, stops = self._buffers.get(f"{part}_share"), coder.neuron.stops_gradients
        if share is not None and share.requires_grad:
            return through_share(x, recoded, share, coder.range_ends(x), stops=stops)
        if not stops:
            return pass_through(x, recoded)
        within = within_share(x.detach(), self.share(part), coder.range_ends(x.detach()))
        return pass_through(x, recoded, within)

    def _group(self, name: str) -> Tensor:
        """Group of every channel of a part, uint8 ``(heads, channels)``; Q and probabilities have
        one group for all.
        """
        if name in ("key", "value"):
            return self.get_buffer(f"{name}_group")
        channels = self.shape.key_channels if name == "query" else 1
        return torch.zeros(1, channels, dtype=torch.uint8, device=self.key_group.device)

    def _coder(self, name: str, group: Tensor, axis: str) -> HeadCoder:
        self.forget_if_written()
        coders = self._coders
        if coders is None:
            coders = self._coders = {}
        if name not in coders:
            settings, beyond = getattr(self.settings, name), self._buffers.get(f"{name}_threshold")
            if beyond is None or not bool(beyond.isfinite().any()):
                coders[name] = HeadCoder(settings, group, axis, self.price(name), self.share(name))
            else:
                coders[name] = MassiveHeadCoder(
                    settings, group, beyond, self.price(name), self.share(name)
                )
        return coders[name]


def _entries(pairs: Tensor) -> tuple[Tensor, ...]:
    """The three entries of symmetric maps ``(heads, half, 2, 2)``, each ``(heads, 1, half)``."""
    return tuple(pairs[:, None, :, row, column] for row, column in ((0, 0), (0, 1), (1, 1)))
