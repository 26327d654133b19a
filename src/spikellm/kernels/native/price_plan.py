"""What a native kernel needs to know of the price of a neuron's spikes, or of levels of its own.

``native/price.h`` says the same in C.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.neurons import SoftResetNeuron
from spikellm.neurons.base import keeps
from spikellm.neurons.price import phase_levels


class PriceWords(NamedTuple):
    """Words of a plan: three of its header, and a table behind everything else, int32."""

    header: list[int]
    table: Tensor


def own_coding(neuron: SoftResetNeuron, steps: Collection[int]) -> str | None:
    """Why kernels cannot code as a neuron does in so many steps; None if they can."""
    if keeps(neuron, "encode", "fake_quantize"):
        return None
    if neuron.levels_of(1) is None:
        return "its neuron encodes in a way of its own"
    if len(set(steps)) > 1:
        return f"its neuron has other levels for each of {len(set(steps))} numbers of steps"
    return None


def price_words(neuron: SoftResetNeuron | None, steps: int, top: int) -> PriceWords:
    """The words of a neuron with codes up to ``top``, which ``steps`` reach; zeros where it rounds
    to the nearest code.
    """
    nothing = torch.zeros(0, dtype=torch.int32)
    own = None if neuron is None else neuron.levels_of(steps)
    if neuron is None or (own is None and neuron.price == 0):
        return PriceWords([0, 0, 0], nothing)
    if own is None and neuron.priced == "binary":
        return PriceWords([bits_of(neuron.price / 2), 0, 0], nothing)
    edges, counts = own or phase_levels(neuron.price, neuron.recoding, top)
    reach = int(edges[-1]) + 1
    first = torch.bucketize(torch.arange(reach).float(), edges)  # decisions below
    table = torch.cat([edges.view(torch.int32), counts.int(), first.int()])
    return PriceWords([0, len(edges), reach], table)


def bits_of(value: float) -> int:
    """A float32 number as the 32-bit integer with the same bits."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
