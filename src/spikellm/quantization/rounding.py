"""The rounding rule of every neuron and weight here: to the nearest integer, a tie upwards."""

from __future__ import annotations

import torch
from torch import Tensor


def half_up(value: Tensor) -> Tensor:
    """``floor(value + 1/2)``, without the rounding error of that sum in floating point.

    An integrate-and-fire neuron that starts at half its threshold fires when it *reaches* the
    threshold, so a tie goes up; ``torch.round`` sends it to the even neighbour. ``value -
    round(value)`` is exact (Sterbenz), so the tie is seen exactly.
    """
    nearest = torch.round(value)
    return nearest.add_((value - nearest).eq_(0.5))
