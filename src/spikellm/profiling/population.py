"""Spikes of the neurons at the input of a layer, or of a part of attention, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from spikellm.neurons import SoftResetNeuron
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.thresholds import Threshold


class Population(NamedTuple):
    """Spikes of the neurons at the input of a layer, or of Q, K or V, for all tokens of a window.

    Channels are in the order of the model.

    Attributes:
        name: of the layer within the block, or of the attention module and the part
            (``self_attn.key``).
        codes: merged spike counts, int32 ``(tokens, channels)``; heads of attention one after the
            other.
        steps: T of every channel in ordinary tokens, int64 ``(channels,)``.
        group: activation group of every channel, int64 ``(channels,)``; 0 throughout for attention.
        neuron: the neuron that fired.
        thresholds: θ and z ``(tokens, groups)`` of a layer, float32; None for attention.
        token_steps: T that every channel of a token takes at least, int64 ``(tokens,)``: that of
            massive tokens, 0 in others.
    """

    name: str
    codes: Tensor
    steps: Tensor
    group: Tensor
    neuron: SoftResetNeuron
    thresholds: Threshold | None
    token_steps: Tensor

    @property
    def code_steps(self) -> Tensor:
        """T of every code, int64 ``(tokens, channels)``."""
        return torch.maximum(self.token_steps[:, None], self.steps)

    @property
    def salient(self) -> Tensor:
        """Channels with more steps than the least, or with a range of their own, bool
        ``(channels,)``.
        """
        return (self.steps > self.steps.min()) | (self.group >= 2)

    def of_token(self, token: int) -> Tensor:
        """Binary spikes of one token, int8 ``(moments, channels)``."""
        planes = self.neuron.iterate_binary(self.codes[token], self.code_steps[token])
        return torch.stack(list(planes))

    def planes(self) -> Iterator[Tensor]:
        """Binary spikes of every moment, int8 ``(tokens, channels)``: the T·L planes of the neuron,
        whose sum is the codes.
        """
        return self.neuron.iterate_binary(self.codes, self.code_steps)


def layer_population(name: str, layer: SpikingLinear, x: Tensor) -> Population:
    """Spikes that a layer fires on an input, ``(…, tokens, in)``.

    Raises:
        RequestError: the layer does not code its inputs.
    """
    tokens = x.reshape(-1, layer.in_features)
    stored, thresholds = layer.encode(tokens)
    order = layer.layout().order
    codes = (
        stored if order is None else torch.empty_like(stored).index_copy_(1, order, stored)
    ).cpu()
    theta = [pair[0].expand(len(codes), 1).float() for pair in thresholds]
    baseline = [pair[1].expand(len(codes), 1).float() for pair in thresholds]
    massive = layer.massive
    none = torch.zeros(len(codes), dtype=torch.int64)
    return Population(
        name,
        codes,
        layer.channel_steps.long().cpu(),
        layer.channel_group.long().cpu(),
        cast(SoftResetNeuron, layer.neuron),
        Threshold(torch.cat(theta, 1).cpu(), torch.cat(baseline, 1).cpu()),
        none if massive is None else massive.steps_of(tokens.float(), 0).flatten().cpu(),
    )


def attention_populations(trains: list[SpikeTrain], block: nn.Module) -> Iterator[Population]:
    """Populations of Q, K and V of a block's attention, from observed spike trains."""
    names = {
        module: name.rpartition(".")[0]
        for name, module in block.named_modules()
        if isinstance(module, SpikingAttention)
    }
    for train in trains:
        if train.source in names and train.part != "probabilities":
            heads, channels = train.codes.shape[1], train.codes.shape[3]
            codes = train.codes[0].transpose(0, 1).reshape(-1, heads * channels).cpu()
            steps = train.steps.expand(heads, 1, channels).reshape(-1).long().cpu()
            yield Population(
                f"{names[train.source]}.{train.part}",
                codes,
                steps,
                torch.zeros_like(steps),
                train.neuron,
                None,
                torch.zeros(len(codes), dtype=torch.int64),
            )


def channel_order(layer: SpikingLinear) -> Tensor:
    """Channel of every stored column, int64 ``(in,)``."""
    order = layer.layout().order
    return torch.arange(layer.in_features) if order is None else order.cpu()
