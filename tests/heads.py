"""Coders of attention heads, and heads for them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from layers import PRICED
from spikellm.nn.head_codec import HeadCoder
from spikellm.recipe import ActivationRecipe

CODERS = st.builds(
    lambda base, extra, price: ActivationRecipe.model_validate(
        {**base, **extra, **price, "train": "centered"}
    ),
    st.sampled_from(
        [{"bits": b} for b in (1, 2, 4, 7, 8)]
        + [
            {"bits": 4, "symmetric": True},
            {"bits": 2, "neuron": "ternary", "symmetric": True, "steps": 3},
            {"bits": 3, "symmetric": True, "threshold_from": "mean"},
            {
                "bits": 2,
                "neuron": "ternary",
                "symmetric": True,
                "threshold_from": "mean",
                "mean_factor": 1.5,
            },
        ]
    ),
    st.sampled_from(
        [
            {},
            {"salient_rate": 0.3, "salient_steps": 4, "thresholds": "shared", "saliency": "rms"},
            {"salient_rate": 0.3, "salient_steps": 4, "thresholds": "split", "saliency": "rms"},
        ]
    ),
    PRICED,
)


def coder_and_heads(
    settings: ActivationRecipe, channels: int, seed: int
) -> tuple[HeadCoder, torch.Tensor, torch.Tensor]:
    """A coder of three heads, of the whole range or a part of it, values ``(2, 3, 5, channels)`` of
    any size with a token of zeros, and the groups of channels: a third of them salient, all, or
    none.
    """
    generator = torch.Generator().manual_seed(seed)
    group = torch.zeros(3, channels, dtype=torch.uint8)
    if settings.salient_rate:
        count = (max(1, channels // 3), channels, 0)[seed % 3]
        for head in range(3):
            salient = torch.randperm(channels, generator=generator)[:count]
            group[head, salient] = len(settings.group_ranges) - 1
    x = torch.randn(2, 3, 5, channels, generator=generator) * 10 ** float(
        torch.randint(-3, 4, (), generator=generator)
    )
    x[0, 0, 0] = 0
    share = (1.0, 0.8)[seed % 2]
    return HeadCoder(settings, group, price=settings.spikes, share=share), x, group
