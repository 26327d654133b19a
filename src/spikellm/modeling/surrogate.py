"""A linear layer for training: inputs coded as the spiking layer will code them, gradients passed straight through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikellm.modeling.linear import make_layout
from spikellm.neurons import make_neuron
from spikellm.quantization.thresholds import threshold_for_range, token_range
from spikellm.recipe import LinearRecipe


class SurrogateLinear(nn.Module):
    """Stands in for a linear layer inside a copy of its block; parameters have the names of the layer's own.

    While inputs are coded in several groups, the weight's columns are expected in stored order (see :class:`spikellm.modeling.linear.Layout`),
    so that groups are contiguous.

    Args:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        settings: how inputs are coded.
        channel_group: uint8 ``(in,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, settings: LinearRecipe, channel_group: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.settings = settings
        self.coding = settings.activations.spiking
        self.set_groups(channel_group)

    def set_groups(self, channel_group: Tensor) -> None:
        """Set the group of every input channel."""
        self.channel_group = channel_group
        self.layout = make_layout(channel_group, torch.tensor(self.settings.activations.group_steps), self.settings)

    @torch.no_grad()
    def coded(self, x: Tensor) -> Tensor:
        """Values after coding of inputs in stored order, float32, ``(..., in)``."""
        settings, layout = self.settings.activations, self.layout
        neuron, values = make_neuron(settings.neuron, settings.bits), []
        ranges = {span: token_range(x[..., span[0] : span[1]]) for span in set(layout.ranges)}
        for group, steps in enumerate(layout.steps):
            start, stop = layout.bounds[group : group + 2]
            if start == stop:
                continue
            low, high = ranges[layout.ranges[group]]
            theta, baseline = threshold_for_range(low, high, neuron.levels * steps, symmetric=settings.symmetric, signed=neuron.signed)
            values.append(neuron.decode(neuron.encode(x[..., start:stop], theta, baseline, steps), theta, baseline))
        return values[0] if len(values) == 1 else torch.cat(values, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` → ``(..., out)``."""
        if self.coding:
            x = x.float() if self.layout.order is None else x.float().index_select(-1, self.layout.order)
            x = x + (self.coded(x) - x).detach()
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
