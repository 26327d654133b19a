"""Spikes of the neurons at the input of a layer, or of a part of attention, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikellm.neurons import SoftResetNeuron
from spikellm.nn.attention import SpikingAttention
from spikellm.nn.hooks import SpikeTrain
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.thresholds import Threshold

EventForm = Literal["binary", "phase"]
"""Trains of −1, 0 and 1: all spikes worth the same, or powers of two by the moment."""


class Population(NamedTuple):
    """Spikes of the neurons at the input of a layer, or of Q, K or V, for all tokens of a window.

    Channels are in the order of the model.

    Attributes:
        name: of the layer within the block, or of the attention module and the part
            (``self_attn.key``).
        codes: merged codes, int32 ``(tokens, channels)``; heads of attention one after the other.
        fired: spikes less negative spikes of every code, int32, see
            :meth:`spikellm.neurons.SoftResetNeuron.fired`.
        steps: T of every channel in ordinary tokens, int64 ``(channels,)``.
        group: activation group of every channel, int64 ``(channels,)``; 0 throughout for attention.
        neuron: the neuron that fired.
        thresholds: θ and z ``(tokens, groups)`` of a layer, float32; None for attention.
        code_steps: T of every code, int64 ``(tokens, channels)``: more in massive tokens.
        own_range: salient channels with a range of their own, bool ``(channels,)``; None for none.
        constant: whether thresholds are the same for all tokens, whatever these hold.
    """

    name: str
    codes: Tensor
    fired: Tensor
    steps: Tensor
    group: Tensor
    neuron: SoftResetNeuron
    thresholds: Threshold | None
    code_steps: Tensor
    own_range: Tensor | None = None
    constant: bool = False

    @property
    def salient(self) -> Tensor:
        """Channels with more steps than the least, or with a range of their own, bool
        ``(channels,)``.
        """
        finer = self.steps > self.steps.min()
        return finer if self.own_range is None else finer | self.own_range

    def of_token(self, token: int, form: EventForm = "binary") -> Tensor:
        """Spikes of one token, int8 ``(moments, channels)``."""
        own = self._replace(
            fired=self.fired[token : token + 1], code_steps=self.code_steps[token : token + 1]
        )
        return torch.cat([plane for plane, _ in own.planes(form)])

    def planes(self, form: EventForm = "binary") -> Iterator[tuple[Tensor, int]]:
        """Spikes of every moment, int8 ``(tokens, channels)``, and the k of what each is worth,
        2^k; their sum is :attr:`fired`.
        """
        if form == "phase":
            return self.neuron.iterate_phase(self.fired, self.code_steps)
        return ((plane, 0) for plane in self.neuron.iterate_binary(self.fired, self.code_steps))


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
    steps, massive = layer.channel_steps.long(), layer.massive
    code_steps = steps.expand(codes.shape)
    if massive is not None:
        code_steps = torch.maximum(steps, massive.steps_of(tokens.float(), 0))
    found = Threshold(torch.cat(theta, 1).cpu(), torch.cat(baseline, 1).cpu())
    group, neuron = layer.channel_group.long().cpu(), cast(SoftResetNeuron, layer.neuron)
    return Population(
        name,
        codes,
        neuron.fired(codes, found.baseline[:, group]),
        steps.cpu(),
        group,
        neuron,
        found,
        code_steps.cpu(),
        layer.own_range.cpu(),
        layer.fixed is not None,
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
            heads, channels = train.shown.shape[1], train.shown.shape[3]
            codes, fired = (
                one[0].transpose(0, 1).reshape(-1, heads * channels).cpu()
                for one in (train.codes, train.fired)
            )
            whole = train.steps.expand(train.shown.shape)[0].transpose(0, 1).long().cpu()
            code_steps = whole.reshape(-1, heads * channels)
            steps = code_steps.amin(0)  # a token that is not massive takes least
            yield Population(
                f"{names[train.source]}.{train.part}",
                codes,
                fired,
                steps,
                torch.zeros_like(steps),
                train.neuron,
                None,
                code_steps,
            )


def channel_order(layer: SpikingLinear) -> Tensor:
    """Channel of every stored column, int64 ``(in,)``."""
    order = layer.layout().order
    return torch.arange(layer.in_features) if order is None else order.cpu()
