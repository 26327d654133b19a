"""Channel groups of all layers of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spikellm.algorithms.base import BlockContext
from spikellm.models.families import weight_and_bias
from spikellm.nn.channels import Groups, Sample, group_of, salient_channels, salient_columns


def choose_groups(
    context: BlockContext, evidence: Callable[[str], tuple[Tensor, Tensor]]
) -> Iterator[tuple[list[str], dict[str, Groups]]]:
    """Channel groups of all layers of a block.

    Layers that read the same tensor with the same settings are fed by one population of neurons, so
    its salient channels are chosen once for all of them, by what they cost together; with
    ``salient_for: layer`` each layer chooses for itself, as published. Columns whose weights take
    several steps are each layer's own.

    Args:
        evidence: ``evidence(name)`` gives the sampled inputs ``(tokens, in)`` of a layer and its
            weight ``(out, in)``.

    Yields:
        ``(names, groups)``: layers that share their channel groups, and the groups of each.
    """
    pending = list(context.layers)
    while pending:
        first = pending[0]
        activations = context.settings[first].activations
        shared = not activations.spiking or activations.salient_for == "input"
        names = context.shared_input_layers(first) if shared else [first]
        pending = [name for name in pending if name not in names]
        if activations.salient_rate > 0 and context.salient.get(first) != 0:
            weights = torch.cat([evidence(name)[1] for name in names])
            group = group_of(
                salient_channels(
                    Sample(evidence(first)[0], weights),
                    activations,
                    context.recipe.seed,
                    first,
                    count=context.salient.get(first),
                )
            )
        else:
            weight, _ = weight_and_bias(context.layers[first])
            group = torch.zeros(weight.shape[1], dtype=torch.uint8, device=weight.device)
        yield names, {name: Groups(group, _column_steps(name, context, evidence)) for name in names}


def _column_steps(
    name: str, context: BlockContext, evidence: Callable[[str], tuple[Tensor, Tensor]]
) -> Tensor | None:
    settings = context.settings[name]
    return (
        salient_columns(Sample(*evidence(name)), settings, context.recipe.seed, name)
        if settings.weights.salient_rate > 0
        else None
    )
