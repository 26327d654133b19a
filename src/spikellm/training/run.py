"""Train a converted model by the stage that its recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import TypedDict

from spikellm.conversion.journal import Journal
from spikellm.conversion.record import TrainingRecord
from spikellm.models.prepare import evaluating, frozen
from spikellm.recipe.training import StageOptions
from spikellm.training.base import Stage, Trainable, stages
from spikellm.training.journal import TrainingJournal
from spikellm.training.loop import Loop, OnStep
from spikellm.training.passes import Passes
from spikellm.training.text import TrainingText

_WRITES = 60.0  # seconds between two states on disk
_AMPLE = 2.0  # times the original's size that have to be free for it to stay in memory


class TrainOptions(TypedDict, total=False):
    """Keywords of :func:`spikellm.train`, as it describes them."""

    steps: int | None
    settings: Iterable[str]
    device: str | torch.device | None
    journal: str | Path | None
    on_step: OnStep | None
    on_stage: Callable[[str], object] | None
    trust_remote_code: bool
    replaces: bool


@dataclass(frozen=True)
class TrainingRun:
    """How a training runs; nothing here decides its result but the kind of device.

    Attributes:
        device: where it is trained; the model and the original go there and back.
        journal: where the state is kept, to resume from.
        on_step: called after every update.
        on_stage: called with a few words before what takes a while.
    """

    device: torch.device
    journal: Journal | None = None
    on_step: OnStep = lambda _: None
    on_stage: Callable[[str], object] = lambda _: None


def train_model(
    model: Any,
    original: Callable[[], Any],
    options: StageOptions,
    text: TrainingText,
    run: TrainingRun,
) -> TrainingRecord | None:
    """Train a converted model in place; None where no update is asked for, and nothing is changed.

    After an error the model is as it was.

    Args:
        original: gives what it was converted from; asked for only where the stage needs it.

    Raises:
        RequestError: there is nothing to train.
        NumericalError: see :meth:`spikellm.training.loop.Loop.run`.
    """
    if options.steps == 0:
        return None
    stage = stages[options.name]()
    teacher = original() if stage.needs_original else None
    with _on(run.device, model, teacher), evaluating(model), frozen(model):
        trained = stage.parameters(model, options)
        starts = [one.tensor.detach().clone() for one in trained]
        try:
            for one in trained:
                one.tensor.requires_grad_(True)
            run.on_stage(_in_words(trained, options, text))
            passes = Passes(
                model,
                teacher,
                partial(stage.loss, options=options),
                options,
                offloads=teacher is not None and _is_large(teacher),
            )
            loop = Loop(model, trained, passes, options, text)
            kept = None if run.journal is None else TrainingJournal(run.journal, _WRITES)
            record = loop.run(kept, run.on_step)
        except BaseException:
            _restore(trained, starts, stage, model)
            raise
        for one in trained:
            one.tensor.requires_grad_(False)
        if record.best == 0:
            _restore(trained, starts, stage, model)
        else:
            stage.finish(model, options)
    return record


def _restore(trained: list[Trainable], starts: list[Any], stage: Stage, model: Any) -> None:
    for one, start in zip(trained, starts, strict=True):
        one.tensor.requires_grad_(False)
        one.tensor.grad = None
        one.tensor.data.copy_(start)
    stage.undo(model)


def _in_words(trained: list[Trainable], options: StageOptions, text: TrainingText) -> str:
    count = sum(one.tensor.numel() for one in trained)
    return (
        f"training {count:,} numbers in {options.steps} updates of {options.batch} windows of"
        f" {text.windows.shape[1]} tokens"
    )


def _is_large(model: nn.Module) -> bool:
    """Whether a model's weights had better leave memory after use."""
    import psutil

    size = sum(one.numel() * one.element_size() for one in model.parameters())
    return size * _AMPLE > float(psutil.virtual_memory().available)


@contextmanager
def _on(device: torch.device, *models: Any) -> Iterator[None]:
    """Models on a device, and back where they were."""
    present = [model for model in models if model is not None]
    homes = [next(model.parameters()).device for model in present]
    try:
        for model, home in zip(present, homes, strict=True):
            if home != device:
                model.to(device)
        yield
    finally:
        for model, home in zip(present, homes, strict=True):
            if home != device:
                model.to(home)
