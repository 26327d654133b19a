"""The evaluation harness (lm-eval): its parts that are used, task files, and its output."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from spikellm.core.errors import DependencyError, RequestError, SpikeLLMError

OnBatch = Callable[[int, int], None]
_SEED = 1234  # the harness's own
_LOUD = ("lm_eval", "datasets", "fsspec", "httpx", "urllib3")


class Harness:
    """The parts of lm-eval that are used, imported on demand."""

    def __init__(self) -> None:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        self.evaluate, self.HFLM, self.TaskManager = evaluate, HFLM, TaskManager

    def counting(self, on_batch: OnBatch | None) -> Any:
        """The harness's model class, which reports its progress in place of drawing bars."""

        class CountingModel(self.HFLM):  # type: ignore[name-defined, misc]
            def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
                return super().loglikelihood(requests, disable_tqdm=True)

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

            def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
                return super().generate_until(requests, disable_tqdm=True)

            def _loglikelihood_tokens(self, requests: Any, *_: Any, **keywords: Any) -> Any:
                self._done, self._total = 0, len(requests)
                keywords["disable_tqdm"] = True
                return super()._loglikelihood_tokens(requests, **keywords)

            def _model_call(self, inps: Any, *arguments: Any, **keywords: Any) -> Any:
                found = super()._model_call(inps, *arguments, **keywords)
                if on_batch and hasattr(self, "_total"):
                    self._done = min(self._done + len(inps), self._total)
                    on_batch(self._done, self._total)
                return found

        return CountingModel

    def scores(self, model: Any, tasks: list[Any], shots: int | None, limit: int | None) -> Any:
        """What ``simple_evaluate`` gives for a model and tasks, without what it notes of the
        machine: that runs git in the current folder, and pip.
        """
        loaded = self.TaskManager(include_defaults=False).load(tasks)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if shots is not None and own != 0:  # a task that says 0 means it
                task.set_config(key="num_fewshot", value=shots)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        return self.evaluate(model, loaded, limit=limit, log_samples=False, bootstrap_iters=1000)


def checked_folder(folder: Path, trusted: bool) -> Path:
    """A folder of task files, if the user trusts it.

    The files cannot be checked instead: functions, included files, templates, pickled data and
    metric scripts all run code.

    Raises:
        RequestError: no folder, no task file in it, or no trust.
    """
    files = [*folder.rglob("*.yaml"), *folder.rglob("*.yml")] if folder.is_dir() else []
    if not files:
        raise RequestError(
            f"task folder {folder}: expected a folder with task files (*.yaml), found"
            f" {'none in it' if folder.is_dir() else 'no folder'}"
        )
    if not trusted:
        raise RequestError(
            f"task folder {folder}: task files can run any Python code; read them, then allow it"
            " with --trust-remote-code"
        )
    return folder


def build_tasks(harness: Harness, names: list[str], folder: Path | None) -> list[Any]:
    """Task objects by name.

    The harness's own list takes some seconds to read, so it is read only for names that are not in
    the folder.

    Raises:
        RequestError: an unknown task, or a file that makes no task.
        DependencyError: the data of a task cannot be reached.
    """
    try:
        manager = harness.TaskManager(
            include_path=str(folder) if folder else None, include_defaults=False
        )
        if any(name not in manager.all_tasks for name in names):
            manager = harness.TaskManager(include_path=str(folder) if folder else None)
    except Exception as error:
        raise RequestError(f"task folder {folder}: {one_line(error)}") from error
    built: dict[str, Any] = {}
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = (
                f"; did you mean {' or '.join(near)}?"
                if near
                else "; `lm-eval ls tasks` lists what the harness has"
            )
            raise RequestError(f"unknown task {name!r}{hint}")
        try:
            built.update(manager.load([name])["tasks"])
        except Exception as error:
            raise _cannot_load(name, error) from error
    return list(built.values())


def _cannot_load(name: str, error: Exception) -> SpikeLLMError:
    words = f"{type(error).__name__}: {one_line(error)}"
    network = isinstance(error, ConnectionError) or re.search(
        r"connect|offline|resolve|reach|hub", words, re.IGNORECASE
    )
    if network:
        return DependencyError(
            f"the data of task {name!r} is not here and could not be fetched ({words}); connect to"
            " the hub, or name tasks of a folder of your own (--task-folder)"
        )
    return RequestError(
        f"task {name!r} cannot be made from its file ({words}); correct its YAML or its data"
    )


def one_line(error: Exception) -> str:
    """The message of an error, shortened to one line."""
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what the harness prints to standard output, its warnings, and the bars that it draws
    without asking.
    """
    from tqdm import tqdm

    hidden = partialmethod(tqdm.__init__, disable=True)
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            mock.patch.object(tqdm, "__init__", hidden),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
