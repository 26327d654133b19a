"""Spending a budget of steps: each step goes to the column where it lowers the error most."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def spend(errors: Tensor, budget: float) -> Tensor:
    """Steps of every column, for a given average.

    Greedy on the mean gain of a step: from t steps a column may go to the u > t of the largest ``(E_t − E_u)/(u − t)``, which follows the lower convex hull
    of its errors, so that a step that only pays together with the next one is not missed. Optimal for hulls, up to the last column's share.

    Args:
        errors: ``errors[t−1, c]``: error of column c at t steps, ``(most steps, in)``.
        budget: average steps, from 1 to the most steps.

    Returns:
        int64 ``(in,)``, at least 1 each, ``round(budget · in)`` in all.
    """
    most, columns = errors.shape
    table = errors.double().T.tolist()
    left = min(round(budget * columns), most * columns) - columns
    steps = [1] * columns

    def best(column: int) -> tuple[float, int, int]:
        now, row = steps[column], table[column]
        gain, target = max(((row[now - 1] - row[later - 1]) / (later - now), -later) for later in range(now + 1, most + 1))
        return -gain, column, -target

    heap = [best(column) for column in range(columns)] if most > 1 else []
    heapq.heapify(heap)
    while left > 0:
        _, column, target = heapq.heappop(heap)
        target = min(target, steps[column] + left)
        left -= target - steps[column]
        steps[column] = target
        if target < most:
            heapq.heappush(heap, best(column))
    return torch.tensor(steps, device=errors.device)
