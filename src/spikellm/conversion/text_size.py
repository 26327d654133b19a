"""Whether the calibration text is long enough for the layers that are fitted to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikellm.conversion.plan import ConversionPlan
from spikellm.models.families import weight_and_bias
from spikellm.nn.rotation import layer_name

_GRAM = 8  # so many tokens in a row seldom come twice in a text
_PRIME = 1_000_003


def too_little_text(plan: ConversionPlan) -> list[str]:
    """A line where layers see fewer different tokens than the algorithm should have for each of
    their input channels, and what would do; else nothing.
    """
    wanted = plan.algorithm.tokens_per_channel(plan.recipe)
    head = [plan.head] if plan.head and plan.algorithm.fits_alone else []
    channels = {
        name: weight_and_bias(plan.model.get_submodule(name))[0].shape[1]
        for block in (*plan.plan, *head)
        for name in block.linears
    }
    if not wanted or not channels:
        return []
    widest = max(channels, key=lambda name: channels[name])
    needed, count = wanted * channels[widest], plan.windows.numel()
    share = different_share(plan.windows)
    seen = round(share * count)
    if seen >= needed:
        return []
    short = sum(seen < wanted * width for width in channels.values())
    samples = math.ceil(needed / share / plan.windows.shape[1])
    remedy = (
        f"take --samples {samples} or more"
        if share > 0.8
        else f"give a longer text, and --samples {max(samples, len(plan.windows))}"
    )
    return [
        f"little calibration text: {seen:,} tokens for {channels[widest]:,} input"
        f" channels of {layer_name(widest)}; {short} of {len(channels)} layers see fewer than"
        f" {wanted} a channel, so {plan.recipe.algorithm.name} may fit them to chance; {remedy}"
    ]


def different_share(windows: Tensor) -> float:
    """Share of the tokens of windows ``(windows, seqlen)`` that other windows do not repeat, where
    they were drawn from the same places of a short text: of runs of 8 tokens those that differ.
    """
    length = min(_GRAM, windows.shape[1])
    runs = torch.zeros_like(windows[:, length - 1 :])
    for place in range(length):
        runs = runs * _PRIME + windows[:, place : place + runs.shape[1]]  # wraps around
    return float(runs.unique().numel() / runs.numel())
