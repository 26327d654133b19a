"""The calibration windows of each rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core import distributed
from spikellm.core.errors import RequestError


class OwnWindows(NamedTuple):
    """Calibration windows of this rank, ``(windows, seqlen)``; tokens of those before them, and of all."""

    windows: Tensor
    before: int
    whole: int


def own_windows(windows: Tensor, size: int) -> OwnWindows:
    """This rank's share of the calibration windows, in whole batches of ``size``, so that every batch is computed as one process would.

    Raises:
        RequestError: there are fewer batches than ranks.
    """
    batches = windows.split(size)
    if len(batches) < distributed.count():
        raise RequestError(
            f"{len(windows)} calibration windows are {len(batches)} batches, which {distributed.count()} ranks cannot share; give more --samples, or run fewer ranks"
        )
    start, stop = (len(batches) * rank // distributed.count() for rank in (distributed.own(), distributed.own() + 1))
    return OwnWindows(torch.cat(batches[start:stop]), sum(batch.numel() for batch in batches[:start]), windows.numel())
