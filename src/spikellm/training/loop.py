"""The loop of training: updates, looks at what is held out, the best state, and what happens where
a loss is not finite. A training ends in the same bytes whether or not it was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spikellm.conversion.record import CheckRecord, TrainingRecord
from spikellm.core import distributed
from spikellm.core.errors import NumericalError
from spikellm.core.fingerprint import fingerprint
from spikellm.recipe.training import StageOptions
from spikellm.training.base import Trainable
from spikellm.training.journal import TrainingJournal
from spikellm.training.parameters import forget_coders, forget_prepared
from spikellm.training.passes import Passes
from spikellm.training.positions import Positions
from spikellm.training.text import TrainingText

_RETRIES = 3


@dataclass(frozen=True)
class StepProgress:
    """Where training stands: for people, never saved.

    Attributes:
        step, steps: updates done and in all.
        loss: of the last update, per token in nats; of what is held out where that was looked at.
        held_out: see there; None otherwise.
        seconds_left: at the pace so far; None before the first update.
    """

    step: int
    steps: int
    loss: float | None
    held_out: float | None
    seconds_left: float | None


OnStep = Callable[[StepProgress], object]


@dataclass
class _Facts:
    """What is saved with positions, beside tensors."""

    step: int = 0
    factor: float = 1.0
    retries: int = 0
    best: int = 0
    best_loss: float | None = None
    losses: list[float] = field(default_factory=list)
    checks: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Loop:
    """One training.

    Args:
        model: whose numbers are trained, in place.
        trained: which.
        passes: its losses.
        options: how long, at which rates.
        text: what it is trained on, the same on all ranks.
    """

    def __init__(
        self,
        model: Any,
        trained: Sequence[Trainable],
        passes: Passes,
        options: StageOptions,
        text: TrainingText,
    ) -> None:
        self._model, self._trained, self._passes = model, trained, passes
        self._options, self._text = options, text
        self._positions = Positions(trained, options)
        self._facts = _Facts()
        self._best = self._positions.snapshot()
        self._begun, self._done = time.monotonic(), 0
        self._device = next(model.parameters()).device

    def run(self, journal: TrainingJournal | None, on_step: OnStep) -> TrainingRecord:
        """Train; the best state is in place afterwards.

        Raises:
            NumericalError: the loss or a gradient is NaN or infinite at ever lower rates.
            CheckpointError: the state to go on from is damaged.
        """
        if journal is not None and (held := journal.read()) is not None:
            self._take_over(journal, *held)
        facts, options = self._facts, self._options
        if not facts.checks:
            self._check(on_step)
        while facts.step < options.steps:
            problem = self._update()
            if problem is not None:
                self._go_back(problem)
                continue
            facts.step += 1
            self._done += 1
            if facts.step % options.check_every == 0 or facts.step == options.steps:
                self._check(on_step)
            else:
                on_step(self._progress(facts.losses[-1], None))
            if journal is not None and facts.step < options.steps and journal.is_due():
                journal.write(self._tensors(), self._plain())
        self._positions.go_to(self._best)
        forget_prepared(self._model)
        return self._record()

    def _update(self) -> str | None:
        """One update; what is not finite, where something is, and then nothing is changed."""
        options, step = self._options, self._facts.step
        batch = self._text.windows[step * options.batch : (step + 1) * options.batch]
        own = batch[distributed.rank() :: distributed.world_size()].to(self._device)
        targets, total = batch.shape[0] * (batch.shape[1] - 1), 0.0
        for part in own.split(options.at_once or max(1, len(own))) if len(own) else ():
            total += self._passes.backward(part, 1.0 / targets)
            self._positions.collect()
        loss = distributed.sum_scalar(total) / targets
        self._positions.reduce()
        problem = None if math.isfinite(loss) else "the loss"
        if problem is None and (name := self._positions.first_not_finite()) is not None:
            problem = f"the gradient of {name}"
        if problem is not None:
            self._positions.drop_gradients()
            return problem
        self._facts.losses.append(loss)
        self._positions.step(self._positions.rate(step) * self._facts.factor)
        forget_coders(self._model)
        return None

    def _go_back(self, problem: str) -> None:
        """The best state again, at lower rates."""
        facts = self._facts
        facts.retries += 1
        if facts.retries > _RETRIES:
            raise NumericalError(
                f"training: {problem} is NaN or infinite at update {facts.step + 1}, also after"
                f" the rate was halved {_RETRIES} times; lower training.rate, or make"
                " training.products to float32"
            )
        facts.factor /= 2
        facts.notes.append(
            f"{problem} was NaN or infinite in update {facts.step + 1}; went on from update"
            f" {facts.best} at {facts.factor:g} of the rate"
        )
        self._positions.go_to(self._best)

    def _check(self, on_step: OnStep) -> None:
        """Look at what is held out, and keep the state if it is the best."""
        facts, windows = self._facts, self._text.held_out
        if len(windows) == 0:
            facts.best, self._best = facts.step, self._positions.snapshot()
            if facts.step:
                on_step(self._progress(facts.losses[-1], None))
            return
        forget_prepared(self._model)
        own = windows[distributed.rank() :: distributed.world_size()].to(self._device)
        size = self._options.at_once or self._options.batch
        total = math.fsum(self._passes.loss(part) for part in own.split(size)) if len(own) else 0.0
        count = windows.shape[0] * (windows.shape[1] - 1)
        loss = distributed.sum_scalar(total) / count
        if math.isfinite(loss):
            facts.checks.append([facts.step, loss])
        if math.isfinite(loss) and (facts.best_loss is None or loss < facts.best_loss):
            facts.best, facts.best_loss = facts.step, loss
            self._best = self._positions.snapshot()
        on_step(self._progress(facts.losses[-1] if facts.losses else None, loss))

    def _progress(self, loss: float | None, held_out: float | None) -> StepProgress:
        facts, steps = self._facts, self._options.steps
        pace = (time.monotonic() - self._begun) / self._done if self._done else None
        left = None if pace is None else pace * (steps - facts.step)
        return StepProgress(facts.step, steps, loss, held_out, left)

    def _tensors(self) -> dict[str, Tensor]:
        best = {
            f"best.{one.name}": position
            for one, position in zip(self._trained, self._best, strict=True)
        }
        return {**self._positions.state(), **best}

    def _plain(self) -> dict[str, Any]:
        return dict(vars(self._facts))

    def _take_over(
        self, journal: TrainingJournal, tensors: dict[str, Tensor], plain: dict[str, Any]
    ) -> None:
        try:
            facts = _Facts(**plain)
            best = [tensors[f"best.{one.name}"].to(self._device) for one in self._trained]
            self._positions.load(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise journal.damaged(error) from None
        self._facts, self._best = facts, best

    def _record(self) -> TrainingRecord:
        facts, text = self._facts, self._text
        notes = list(facts.notes)
        if facts.best == 0 and self._options.steps:
            notes.append(
                "training lowered no loss on what was held out, so nothing was changed; lower"
                " training.rate, or give more calibration text"
            )
        return TrainingRecord(
            trained=sum(one.tensor.numel() for one in self._trained),
            tokens=self._options.batch * text.windows.shape[1],
            losses=facts.losses,
            checks=[CheckRecord(update=int(step), loss=loss) for step, loss in facts.checks],
            best=facts.best,
            sha256=fingerprint(text.windows),
            notes=notes,
        )
