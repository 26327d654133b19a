"""Channel groups of all layers of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spikellm.algorithms.base import BlockContext, InputCoding
from spikellm.models.families import weight_and_bias
from spikellm.nn.channels import Groups, Sample, grouped, salient_columns
from spikellm.nn.constant_thresholds import constant_thresholds
from spikellm.nn.fake_quant import InputCoder
from spikellm.quantization.massive_tokens import find_massive
from spikellm.quantization.thresholds import FULL_RANGE
from spikellm.recipe import ActivationRecipe

_TOKENS = 1024  # on which a share is measured
_SHARES = range(FULL_RANGE, FULL_RANGE // 2, -2)
_BEYOND = 6  # how far below the best share so far a better one is looked for
_FACTORS = (12, 16, 20, 25, 32, 40, 50, 63, 79, 99, 124, 156, 196, 245)  # of the mean, in 16ths
_MOST_FACTOR = 255


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
        weights = [evidence(name)[1] for name in names] if needs_inputs(activations) else []
        if activations.clusters > 1 or (
            activations.salient_rate > 0 and context.salient.get(first) != 0
        ):
            group = grouped(
                Sample(evidence(first)[0], torch.cat(weights)),
                activations,
                context.recipe.seed,
                first,
                count=context.salient.get(first),
            )
        else:
            weight, _ = weight_and_bias(context.layers[first])
            group = torch.zeros(weight.shape[1], dtype=torch.uint8, device=weight.device)
        fixed = None
        if activations.static:
            x, scale = evidence(first)[0], context.token_scale(first)
            x = x if scale is None else x / scale
            fixed = constant_thresholds(activations, group, x, torch.cat(weights), scale)
        share, price = context.coding.get(first, InputCoding(activations.range_share))
        if activations.searches_share and first not in context.coding:
            share = search_share(activations, group, evidence(first)[0], torch.cat(weights))
        massive = None
        if steps := activations.token_steps:
            factor, rate = activations.token_factor, activations.token_rate
            massive = find_massive(context.range_widths(first), steps, factor, rate)
        yield (
            names,
            {
                name: Groups(
                    group, _column_steps(name, context, evidence), share, massive, price, fixed
                )
                for name in names
            },
        )


def needs_inputs(settings: ActivationRecipe) -> bool:
    """Whether a choice for inputs coded so takes a sample of them."""
    searched = settings.search_range or settings.token_steps > 0 or settings.static
    return settings.salient_rate > 0 or settings.clusters > 1 or searched


def search_share(
    settings: ActivationRecipe, channel_group: Tensor, x: Tensor, weight: Tensor
) -> int:
    """The share of its range in which a token's inputs lose least, in 64ths; or the multiple of its
    mean magnitude, in 16ths.

    Args:
        channel_group: uint8 ``(in,)``.
        x: sampled inputs, ``(tokens, in)``.
        weight: of all layers that read them, ``(out, in)``.
    """
    x = x[:: -(-len(x) // _TOKENS)].float()
    weight = weight.detach().float().to(x.device)
    product = weight.T
    if len(weight) > weight.shape[1]:  # E[e WᵀW eᵀ] takes fewer products
        product = weight.T @ weight

    def loss(share: int) -> float:
        error = InputCoder(settings, channel_group, share).values(x) - x
        output = error @ product
        other = output if len(weight) <= weight.shape[1] else error
        return float((output * other).sum(dtype=torch.float64))

    if settings.threshold_from == "mean":
        return _best_factor(loss)
    best, least = FULL_RANGE, float("inf")
    for share in _SHARES:  # less clipping means coarser codes: the loss falls, then rises
        if best - share > _BEYOND:
            break
        if (lost := loss(share)) < least:
            best, least = share, lost
    return best


def _best_factor(loss: Callable[[int], float]) -> int:
    """The factor that loses least: of those a quarter apart, then around the best of them."""
    tried = {factor: loss(factor) for factor in _FACTORS}
    best = min(tried, key=tried.__getitem__)
    for apart in (8, 16, 32):  # parts of the best
        near = {best - best // apart, best + best // apart} - set(tried)
        tried |= {factor: loss(factor) for factor in near if 0 < factor <= _MOST_FACTOR}
        best = min(tried, key=tried.__getitem__)
    return best


def _column_steps(
    name: str, context: BlockContext, evidence: Callable[[str], tuple[Tensor, Tensor]]
) -> Tensor | None:
    settings = context.settings[name]
    return (
        salient_columns(Sample(*evidence(name)), settings, context.recipe.seed, name)
        if settings.weights.salient_rate > 0
        else None
    )
