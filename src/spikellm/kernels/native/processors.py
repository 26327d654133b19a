"""How many threads a step may use: torch's number, and no more than this process has processors."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def step_threads() -> int:
    """Threads of a step: what ``torch.set_num_threads`` or ``OMP_NUM_THREADS`` say, at most as many
    as the process may run on and its control group pays for.
    """
    return min(torch.get_num_threads(), _processors())


@cache
def _processors() -> int:
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        return min(own, quota_of(_QUOTA.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return own


def quota_of(text: str) -> int:
    """Processors that a control group pays for, of the text of its ``cpu.max``; a thousand where it
    sets no limit.

    Raises:
        ValueError: the text says something else.
    """
    quota, period = text.split()
    return 1000 if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
