"""Spending a budget of steps: each step goes to the column where it lowers the error most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def spend(errors: Tensor, budget: float, costs: Sequence[int] | None = None) -> Tensor:
    """Steps of every column, for a given average.

    Greedy on the mean gain of a step: from t steps a column may go to the u > t of the largest
    ``(E_t − E_u)/(u − t)``, which follows the lower convex hull of its errors, so that a step that
    only pays together with the next one is not missed. Optimal for hulls, up to the last column's
    share.

    Args:
        errors: ``errors[t−1, c]``: error of column c at t steps, ``(most steps, in)``.
        budget: average steps, from 1 to the most steps.
        costs: what a step of each column costs (its weights), where columns are of several layers;
            1 each by default. Gains are weighed by it.

    Returns:
        int64 ``(in,)``, at least 1 each; ``round(budget · Σcosts)`` in all, or less by what no
        column could use.
    """
    most, columns = errors.shape
    table, price = errors.double().T.tolist(), list(costs) if costs is not None else [1] * columns
    left = min(round(budget * sum(price)), most * sum(price)) - sum(price)
    steps = [1] * columns

    def best(column: int) -> tuple[float, int, int]:
        now, row = steps[column], table[column]
        gain, target = max(
            ((row[now - 1] - row[later - 1]) / (later - now), -later)
            for later in range(now + 1, most + 1)
        )
        return -gain / price[column], column, -target

    heap = [best(column) for column in range(columns)] if most > 1 else []
    heapq.heapify(heap)
    while left > 0 and heap:
        _, column, target = heapq.heappop(heap)
        target = min(target, steps[column] + left // price[column])
        left -= (target - steps[column]) * price[column]
        if target > steps[column] and target < most:
            steps[column] = target
            heapq.heappush(heap, best(column))
        steps[column] = target
    return torch.tensor(steps, device=errors.device)


def choose_within(losses: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> list[int]:
    """One of several ways for each tensor, of least loss for a budget.

    From its cheapest way on, every tensor follows the lower convex hull of its losses over its
    costs; the step of the largest gain for its cost comes first, so that all end at about one slope
    (one Lagrange multiplier), and what is left goes to steps that still fit.

    Args:
        losses, costs: of the ways of each tensor, float64 ``(ways,)``.
        budget: for the sum of costs; the cheapest ways are taken where even they cost more.

    Returns:
        The place of the way of each tensor.
    """
    hulls = [_hull(loss.tolist(), cost.tolist()) for loss, cost in zip(losses, costs, strict=True)]
    at = [0] * len(hulls)
    left = budget - sum(hull[0][1] for hull in hulls)
    heap: list[tuple[float, int]] = []

    def offer(tensor: int) -> None:
        hull = hulls[tensor][at[tensor] : at[tensor] + 2]
        if len(hull) == 2:
            (_, cost, loss), (_, dearer, less) = hull
            heapq.heappush(heap, ((less - loss) / (dearer - cost), tensor))

    for tensor in range(len(hulls)):
        offer(tensor)
    while heap:
        _, tensor = heapq.heappop(heap)
        added = hulls[tensor][at[tensor] + 1][1] - hulls[tensor][at[tensor]][1]
        if added <= left:
            left -= added
            at[tensor] += 1
            offer(tensor)
    return [hull[place][0] for hull, place in zip(hulls, at, strict=True)]


def _hull(losses: Sequence[float], costs: Sequence[float]) -> list[tuple[int, float, float]]:
    """Lower convex hull of losses over costs as ``(place, cost, loss)``, from the cheapest to the
    least loss.
    """
    found: list[tuple[int, float, float]] = []
    for cost, loss, place in sorted(zip(costs, losses, range(len(costs)), strict=True)):
        if found and loss >= found[-1][2]:
            continue
        while len(found) > 1 and (found[-1][2] - found[-2][2]) * (cost - found[-2][1]) >= (
            loss - found[-2][2]
        ) * (found[-1][1] - found[-2][1]):
            found.pop()
        found.append((place, cost, loss))
    return found
