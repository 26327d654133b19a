"""What a native kernel needs to know of the price of a neuron's spikes.

``native/price.h`` says the same in C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.neurons import SoftResetNeuron
from spikellm.neurons.price import phase_levels


class PriceWords(NamedTuple):
    """Words of a plan: three of its header, and a table behind everything else, int32."""

    header: list[int]
    table: Tensor


def price_words(neuron: SoftResetNeuron | None, top: int) -> PriceWords:
    """The words of a neuron with codes up to ``top``; zeros where its spikes have no price."""
    nothing = torch.zeros(0, dtype=torch.int32)
    if neuron is None or neuron.price == 0:
        return PriceWords([0, 0, 0], nothing)
    if neuron.priced == "binary":
        return PriceWords([bits_of(neuron.price / 2), 0, 0], nothing)
    edges, counts = phase_levels(neuron.price, neuron.recoding, top)
    reach = int(edges[-1]) + 1
    first = torch.bucketize(torch.arange(reach).float(), edges)  # decisions below
    table = torch.cat([edges.view(torch.int32), counts.int(), first.int()])
    return PriceWords([0, len(edges), reach], table)


def bits_of(value: float) -> int:
    """A float32 number as the 32-bit integer with the same bits."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
