"""Weights of zero beside the codes of a layer, whatever codes they are.

By second order (SparseGPT; Frantar and Alistarh, ICML 2023) a weight costs ``w² / U_jj²`` when its
column is next and the columns after it compensate: it is decided block by block, from weights that
compensate for all zeros and codes before them. By Wanda (Sun et al., ICLR 2024) and by magnitude
weights are pruned before they are coded, and nothing compensates for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikellm.algorithms.gptq_options import GptqOptions
from spikellm.quantization.column_update import BLOCK, Windows
from spikellm.quantization.pruning import (
    counts_by_block,
    lowest,
    lowest_in_groups,
    lowest_of_each,
)


class Pruning:
    """Which weights of one layer are zero.

    Args:
        weight: ``(out, in)``, columns in stored order.
        power: of the inputs of stored columns, ``(in,)``: the Hessian's diagonal.
        order: stored column of each column in the order of coding; where n of m are pruned by
            second order, groups of m lie together in it (:func:`order_of_groups`).
        factor: of the inverse Hessian, in the order of coding.

    Attributes:
        marks: of weights that are zero, bool ``(in, out)``, columns in stored order.
        decided: whether they are all known. Error feedback decides them in its first pass, and
            later passes keep them.
    """

    def __init__(
        self, weight: Tensor, power: Tensor, order: Tensor, factor: Tensor, options: GptqOptions
    ) -> None:
        self._options = options
        self._given = weight, power, order, factor
        self._places = order
        self.decided = options.prune_by != "second-order"
        if self.decided:
            self.marks = _beforehand(weight, power, options).T.contiguous()
            return
        self.marks = torch.zeros_like(weight.T, dtype=torch.bool)
        costs = 1 / factor.diagonal().square()
        self._costs = torch.where(power[order] > 0, costs, 0.0)  # what never fires costs nothing
        self._counts: list[int] = []
        if options.zeros_of is None:
            scores = weight[:, order].square() * self._costs
            count = round(options.sparsity * weight.numel())
            self._counts = counts_by_block(scores, count, BLOCK)

    def anew(self) -> Pruning:
        """The same before anything was decided."""
        return Pruning(*self._given, self._options)

    def windows(self, zeros: Tensor | None) -> Windows | None:
        """What decides ahead of codes; None where all is decided.

        Args:
            zeros: what stands for a weight of zero, ``(in, out)``, columns in the order of coding;
                0 by default.
        """
        if self.decided:
            return None
        width = BLOCK if self._options.zeros_of is None else self._options.zeros_of[1]

        def look(first: int, w: Tensor) -> None:
            now = slice(first, first + len(w))
            w = w if zeros is None else w - zeros[now]
            scores = w.square() * self._costs[now].unsqueeze(1)
            self.marks[self._places[now]] = self._least(scores, first)
            self.decided = now.stop == len(self._places)

        return Windows(width, look)

    def _least(self, scores: Tensor, first: int) -> Tensor:
        """Marks of what is pruned of a window, ``(columns, out)``."""
        if self._options.zeros_of is None:
            return lowest(scores, self._counts[first // BLOCK])
        return lowest_in_groups(scores.T, *self._options.zeros_of).T


def _beforehand(weight: Tensor, power: Tensor, options: GptqOptions) -> Tensor:
    """Marks of what is pruned without a look at codes, ``(out, in)``."""
    scores = weight.abs() * power.sqrt() if options.prune_by == "wanda" else weight.abs()
    if options.zeros_of is not None:
        return lowest_in_groups(scores, *options.zeros_of)
    if options.prune_by == "wanda":
        return lowest_of_each(scores, round(options.sparsity * weight.shape[1]))
    return lowest(scores, round(options.sparsity * weight.numel()))


def order_of_groups(power: Tensor, m: int, *, by_power: bool) -> Tensor:
    """The order of coding in which every m stored columns lie together: groups by falling power of
    their inputs, and columns within them; a last group of fewer columns comes last. Without power
    columns are coded as they are stored.

    Args:
        power: of the inputs of stored columns, ``(in,)``.
    """
    if not by_power:
        return torch.arange(len(power), device=power.device)
    whole = len(power) // m * m
    grouped = power[:whole].view(-1, m)
    groups = torch.sort(grouped.sum(1), descending=True, stable=True).indices
    within = torch.sort(grouped, dim=1, descending=True, stable=True).indices
    rest = torch.sort(power[whole:], descending=True, stable=True).indices + whole
    return torch.cat([(groups.unsqueeze(1) * m + within[groups]).flatten(), rest])
