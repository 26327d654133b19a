"""A linear layer for training: inputs coded as the spiking layer will code them, gradients passed straight through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikellm.neurons import make_neuron
from spikellm.quantization.thresholds import threshold_for_range, token_range
from spikellm.recipe import ActivationRecipe


class SurrogateLinear(nn.Module):
    """Stands in for a linear layer inside a copy of its block; parameters have the names of the layer's own.

    Args:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        settings: how inputs are coded.
        channel_group: uint8 ``(in,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, settings: ActivationRecipe, channel_group: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.settings = settings
        self.set_groups(channel_group)

    def set_groups(self, channel_group: Tensor) -> None:
        """Set the group of every input channel."""
        index = channel_group.long()
        self.members = [(index == group).nonzero().flatten() for group in range(len(self.settings.group_ranges))]

    @torch.no_grad()
    def coded(self, x: Tensor) -> Tensor:
        """Values of inputs after coding, float32, ``(..., in)``."""
        settings = self.settings
        neuron, x = make_neuron(settings.neuron, settings.bits), x.float()
        filled = [group for group, members in enumerate(self.members) if len(members)]
        result = x if len(filled) == 1 else torch.empty_like(x)
        for group in filled:
            members, steps = self.members[group], settings.group_steps[group]
            of_range = [self.members[g] for g in filled if settings.group_ranges[g] == settings.group_ranges[group]]
            part, whole = (x, x) if len(filled) == 1 else (x[..., members], x[..., torch.cat(of_range)])
            theta, baseline = threshold_for_range(
                *token_range(whole), neuron.levels * steps, symmetric=settings.symmetric, signed=neuron.signed
            )
            values = neuron.decode(neuron.encode(part, theta, baseline, steps), theta, baseline)
            if len(filled) == 1:
                return values
            result[..., members] = values
        return result

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` → ``(..., out)``."""
        if self.settings.spiking:
            x = x + (self.coded(x) - x).detach()
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
