"""Gradient steps on what is learned of a block, over the calibration text, shared by all ranks.

The best state is kept; a loss that is not finite restores it and halves the rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from spikellm.algorithms.base import BlockContext
from spikellm.core import distributed
from spikellm.core.errors import NumericalError, RequestError

_RETRIES = 3
_LEAST_FACTOR = 0.05  # of the rates, at which something is learned again
_LONGEST_STEP = 1.0  # norm that the gradient is clipped to


class Learnable(Protocol):
    """What is learned of a block."""

    def clone(self) -> Self:
        """A copy that later steps do not touch."""

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Parameters, and the rate at which they are learned."""


L = TypeVar("L", bound=Learnable)


class Course(Protocol):
    """How long something is learned, and from how much at a time: options of an algorithm.

    Attributes:
        epochs: passes over the calibration text.
        batch_size: windows that are run at a time.
        accumulate: batches whose gradients are added up before a step.
    """

    @property
    def epochs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def accumulate(self) -> int: ...


class Manner(NamedTuple):
    """What else one algorithm does otherwise than another.

    Attributes:
        name: of the algorithm, for errors.
        advice: which rates to lower.
        last_resort: what to set where that does not help.
        last_rate: what the rates fall to, as a share of their start, along a cosine.
        relative: whether losses count as shares of the start's, so that clipping and AdamW's
            constants mean the same in every block.
        shrink: what the rates are divided by before everything is learned again where no loss was
            lowered; 1 to keep the start at once.
        held_out: every how many-th batch is not learned from, and states are judged by; 0 to judge
            them by all batches, as where there are fewer.
    """

    name: str
    advice: str
    last_resort: str = ""
    last_rate: float = 1.0
    relative: bool = False
    shrink: float = 1.0
    held_out: int = 0


def check_share(course: Course, windows: Sequence[int], held_out: int = 0) -> None:
    """Refuse a share of the text that does not let ranks take the steps that one would take.

    See :meth:`spikellm.algorithms.Algorithm.check_share`, and ``held_out`` of :class:`Manner`.
    """
    found = distributed.gather_counts(sum(-(-count // course.batch_size) for count in windows))
    if course.epochs == 0:
        return
    if held_out and any(count % held_out for count in found):
        raise RequestError(
            f"ranks have {', '.join(map(str, found))} batches of {course.batch_size} windows; each"
            f" holds one in {held_out} out, so it needs a multiple of {held_out}: give another"
            " number of --samples, or run it without torchrun"
        )
    found = [count - (count // held_out if held_out else 0) for count in found]
    if course.accumulate % distributed.world_size():
        raise RequestError(
            f"algorithm.accumulate is {course.accumulate}: {distributed.world_size()} ranks share"
            f" the batches of each step, so it must be a multiple of {distributed.world_size()};"
            f" add --set algorithm.accumulate={distributed.world_size()}, or run it without"
            " torchrun"
        )
    if len(set(found)) > 1 or found[0] % (course.accumulate // distributed.world_size()):
        raise RequestError(
            f"ranks would learn from {', '.join(map(str, found))} batches of {course.batch_size}"
            " windows; each needs the same number, a multiple of"
            f" {course.accumulate // distributed.world_size()}, so give another number of"
            " --samples, or run it without torchrun"
        )


def batches_of(context: BlockContext, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a block is fed and should give, ``size`` windows at a time."""
    for batch in range(len(context.inputs)):
        parts = (store[batch].split(size) for store in (context.inputs, context.fp_output))
        yield from zip(*parts, strict=True)


class Learning(Generic[L]):
    """Gradient steps on one block.

    Attributes:
        notes: what a user should know of how it went.

    Args:
        name: of the block, for errors.
        course: how long, and from how much at a time.
        batches: inputs and targets, a step's part at a time; of this rank.
        error: ``error(learned, hidden, target)`` is the mean loss on one of them.
        manner: see :class:`Manner`.
    """

    def __init__(
        self,
        name: str,
        course: Course,
        batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
        error: Callable[[L, Tensor, Tensor], Tensor],
        manner: Manner,
    ) -> None:
        self._name, self._course, self._batches = name, course, batches
        self._error, self._manner = error, manner
        self._unit = 1.0  # of losses
        self._schedule: torch.optim.lr_scheduler.LambdaLR
        self.notes: list[str] = []

    def from_start(self, start: L) -> L:
        """The best of the start, of the ends of all epochs and of the last step; the very start
        where nothing is better.

        Raises:
            NumericalError: the loss is NaN or infinite at ever lower rates.
        """
        first, manner = start.clone(), self._manner
        start_loss = math.nan
        if manner.relative:
            start_loss = self._loss(first)
            if math.isfinite(start_loss) and start_loss > 0:
                self._unit = 2.0 ** math.floor(math.log2(start_loss))  # the same for all ranks
        best, best_loss, last_best, factor = first.clone(), math.inf, -1, 1.0
        for _ in range(_RETRIES + 1):
            current = best.clone()
            optimizer = self._optimizer(current, factor)
            for epoch in range(self._course.epochs):
                loss = self._epoch(current, optimizer)
                if not math.isfinite(loss):
                    break
                if manner.held_out:
                    loss = self._loss(current)
                if loss < best_loss:
                    best, best_loss, last_best = current.clone(), loss, epoch
            else:
                ends = [(best_loss if manner.held_out else self._loss(best), best)]
                if last_best != epoch and not manner.held_out:
                    ends.append((self._loss(current), current))
                if math.isnan(start_loss):
                    start_loss = self._loss(first)
                least, found = min(ends, key=lambda end: end[0])
                if least < start_loss:
                    return found
                factor /= manner.shrink
                if manner.shrink == 1 or factor < _LEAST_FACTOR:
                    self.notes.append(
                        f"learning lowered no loss, so the start is kept; lower {manner.advice}"
                    )
                    return start
                self.notes.append(f"no loss was lowered; learned again at {factor:g} of the rates")
                best, best_loss = first.clone(), math.inf
                continue
            factor /= 2
            self.notes.append(
                f"the loss was NaN or infinite in epoch {epoch + 1}; learned again at {factor:g} of"
                " the rates"
            )
            if not math.isfinite(
                self._loss(best)
            ):  # its own loss was measured before its last step
                best, best_loss = first.clone(), math.inf
        raise NumericalError(
            f"{manner.name}: the loss of block {self._name} is NaN or infinite in epoch"
            f" {epoch + 1}, also after lowering the rates {_RETRIES} times; lower {manner.advice}"
            f"{manner.last_resort}"
        )

    @torch.no_grad()
    def _loss(self, learned: L) -> float:
        """Mean loss over the batches that are held out, or over all. Infinite where it is not
        finite.
        """
        losses = [float(self._error(learned, *batch)) for batch in self._parts(held_out=True)]
        mean = distributed.sum_scalar(
            math.fsum(losses) if all(map(math.isfinite, losses)) else math.inf
        ) / distributed.sum_scalar(len(losses))
        return mean if math.isfinite(mean) else math.inf

    def _parts(self, *, held_out: bool) -> list[tuple[Tensor, Tensor]]:
        """Batches that states are judged by, or those that are learned from; of this rank."""
        batches, every = list(self._batches()), self._manner.held_out
        if every == 0 or len(batches) < every:
            return batches
        return [
            batch
            for place, batch in enumerate(batches, start=1)
            if (place % every == 0) == held_out
        ]

    def _optimizer(self, learned: L, factor: float) -> torch.optim.Optimizer:
        groups = [(parameters, rate) for parameters, rate in learned.groups() if parameters]
        for parameters, _ in groups:
            for parameter in parameters:
                parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate * factor} for parameters, rate in groups],
            weight_decay=0.0,
        )
        last, steps = self._manner.last_rate, max(1, self._course.epochs * self._steps())
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: last + (1 - last) * (1 + math.cos(math.pi * min(1, step / steps))) / 2,
        )
        return optimizer

    def _steps(self) -> int:
        """Steps of an epoch."""
        batches = len(self._parts(held_out=False)) * distributed.world_size()
        return -(-batches // self._course.accumulate)

    def _epoch(self, learned: L, optimizer: torch.optim.Optimizer) -> float:
        """One pass over the batches; mean loss, measured before each step.

        The batches of a step lie evenly over the text, so that several ranks, which share the text,
        share each step.
        """
        total, batches = 0.0, self._parts(held_out=False)
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        steps = self._steps()
        for place in range(steps):
            step, lost = batches[place::steps], 0.0
            for batch in step:
                loss = self._error(learned, *batch) / self._unit
                lost += float(loss.detach())
                (loss / (len(step) * distributed.world_size())).backward()
            total += distributed.sum_scalar(lost)
            if not math.isfinite(total):
                return total
            distributed.all_reduce_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, _LONGEST_STEP * max(1.0, len(parameters) ** 0.5))
            optimizer.step()
            self._schedule.step()
            optimizer.zero_grad(set_to_none=True)
        return total / (len(batches) * distributed.world_size())
