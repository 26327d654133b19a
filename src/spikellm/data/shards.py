"""The calibration windows of each rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.core import distributed
from spikellm.core.errors import RequestError


class WindowShard(NamedTuple):
    """A rank's share of the calibration windows.

    Attributes:
        windows: tokens, ``(windows, seqlen)``.
        before: how many tokens the ranks before this one have.
        whole: how many tokens all ranks have.
        opening: how many tokens at the start of a window are the same in all windows of all ranks.
    """

    windows: Tensor
    before: int
    whole: int
    opening: int = 0


def shard_windows(windows: Tensor, size: int) -> WindowShard:
    """This rank's share of the calibration windows, in whole batches of ``size``, so that batches
    are the same as in one process.

    Raises:
        RequestError: there are fewer batches than ranks.
    """
    batches = windows.split(size)
    if len(batches) < distributed.world_size():
        raise RequestError(
            f"{len(windows)} calibration windows are {len(batches)} batches, which"
            f" {distributed.world_size()} ranks cannot share; give more --samples, or run fewer"
            " ranks"
        )
    start, stop = (
        len(batches) * rank // distributed.world_size()
        for rank in (distributed.rank(), distributed.rank() + 1)
    )
    return WindowShard(
        torch.cat(batches[start:stop]),
        sum(batch.numel() for batch in batches[:start]),
        windows.numel(),
        _opening(windows),
    )


def _opening(windows: Tensor) -> int:
    """Tokens at the start that all windows share: a BOS token, say; none of a single window."""
    if len(windows) == 1:
        return 0
    return int((windows == windows[0]).all(0).long().cumprod(0).sum())
