"""What a spiking linear layer keeps of how its inputs are coded, beside groups and their steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from spikellm.quantization.thresholds import FULL_RANGE
from spikellm.recipe import ActivationRecipe

FIXED = ("group_threshold", "group_baseline")
"""Buffers of θ and z where they are constants."""


class Buffer(NamedTuple):
    """A buffer of one dimension, and what it holds before anything was chosen."""

    name: str
    size: int
    dtype: torch.dtype
    value: float


def coding_buffers(settings: ActivationRecipe) -> Iterator[Buffer]:
    """Buffers that a layer with these settings has.

    ``input_range`` where the share of a range is searched; ``token_threshold`` and ``token_share``
    where massive tokens take more steps; ``spike_price`` where spikes have a price;
    ``group_threshold`` and ``group_baseline``, one number for each activation group, where
    thresholds are constants.
    """
    if settings.searches_share:
        yield Buffer("input_range", 1, torch.uint8, FULL_RANGE)
    if settings.token_steps:
        yield Buffer("token_threshold", 1, torch.float32, math.inf)
        yield Buffer("token_share", 1, torch.float32, 0.0)
    if settings.spikes:
        yield Buffer("spike_price", 1, torch.float32, 0.0)
    if settings.static:
        for name, value in zip(FIXED, (1.0, 0.0), strict=True):
            yield Buffer(name, len(settings.group_steps), torch.float32, value)
