"""Zero-shot and few-shot tasks with the evaluation harness of the field (lm-eval), which is used as
it is: its prompts, metrics and task versions.

Task files are programs, not data: they name Python functions, dataset loaders and metrics, and
their templates are evaluated. A folder of them is read only where the user says so.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict, Unpack

from spikellm.core.errors import DependencyError, RequestError, SpikeLLMError
from spikellm.core.extras import require
from spikellm.core.keywords import require_known_keywords
from spikellm.models.prepare import evaluating

PAPER = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
"""The six tasks of the paper."""
OnBatch = Callable[[int, int], None]
_LOUD = ("lm_eval", "datasets", "fsspec", "httpx", "urllib3")


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        accuracy, accuracy_stderr: share of documents whose likeliest choice is right, and its
            standard error; None where the task has no such metric.
        normalised_accuracy, normalised_accuracy_stderr: with log-likelihoods divided by the bytes
            of each choice.
        version: of the task, as the harness gives it.
        shots: examples before each question.
        documents: how many were asked.
        metrics: every metric of the task by its own name.
    """

    accuracy: float | None
    accuracy_stderr: float | None
    normalised_accuracy: float | None
    normalised_accuracy_stderr: float | None
    version: float | str | None
    shots: int
    documents: int
    metrics: dict[str, float] = field(default_factory=dict)


class TaskOptions(TypedDict, total=False):
    """Keywords of :func:`zero_shot`, as it describes them."""

    folder: str | Path | None
    limit: int | None
    shots: int | None
    batch_size: int
    trust_remote_code: bool
    on_batch: OnBatch | None


def zero_shot(
    model: Any, tokenizer: Any, tasks: str | Iterable[str], **options: Unpack[TaskOptions]
) -> dict[str, TaskResult]:
    """Accuracy of a model, converted or not, on tasks of the harness.

    Args:
        tasks: names, or ``"paper"`` for :data:`PAPER`.
        folder: of task files (YAML) of your own, whose tasks may be named too.
        limit: documents of each task, the first ones; all by default.
        shots: examples before each question; as the task says by default.
        batch_size: sequences at a time; 1 by default.
        trust_remote_code: run what the files of ``folder`` name, and Python code that comes with
            the model; needed for every folder.
        on_batch: called with ``(sequences done, sequences in all)``; the harness runs some of them
            together.

    Returns:
        Results by task; a name that stands for several tasks gives them all.

    Raises:
        RequestError: an unknown task, a missing or untrusted folder, or a number below its least.
        DependencyError: lm-eval is not installed, or a task's data cannot be reached.
        SpikeLLMError: the harness fails on a task.
        TypeError: a keyword that is not known.
    """
    require_known_keywords("zero_shot", options, TaskOptions.__annotations__)
    names = expand(tasks)
    limit, shots = options.get("limit"), options.get("shots")
    batch_size, trusted = options.get("batch_size", 1), options.get("trust_remote_code", False)
    if (limit is not None and limit < 1) or batch_size < 1 or (shots is not None and shots < 0):
        raise RequestError(
            f"limit {limit}, batch size {batch_size}, shots {shots}: expected at least 1 document,"
            " 1 sequence and 0 shots"
        )
    given = options.get("folder")
    folder = None if given is None else _checked(Path(given), trusted)
    with _quiet(), evaluating(model):
        require("tasks", "eval", "lm_eval")
        harness = _Harness()
        built = _build(harness, names, folder)
        wrapped = harness.counting(options.get("on_batch"))(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            trust_remote_code=trusted,
        )
        try:
            found = harness.simple_evaluate(
                model=wrapped,
                tasks=built,
                num_fewshot=shots,
                limit=limit,
                task_manager=harness.TaskManager(include_defaults=False),
                log_samples=False,
                bootstrap_iters=1000,
            )
        except Exception as error:
            raise SpikeLLMError(
                f"the harness failed on {', '.join(names)}: {type(error).__name__}:"
                f" {_one_line(error)}"
            ) from error
    return {name: _result(name, found) for name in found["results"]}


def expand(tasks: str | Iterable[str]) -> list[str]:
    """Names of tasks from a comma-separated list or names; ``paper`` stands for six.

    Raises:
        RequestError: there is none.
    """
    given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names: list[str] = []
    for name in filter(None, map(str.strip, given)):
        names += PAPER if name == "paper" else [name]
    if not names:
        raise RequestError(
            "no task is named; give names of lm-eval separated by commas, or paper for the six of"
            " the paper"
        )
    return list(dict.fromkeys(names))


class _Harness:
    """The parts of lm-eval that are used."""

    def __init__(self) -> None:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        self.simple_evaluate, self.HFLM, self.TaskManager = simple_evaluate, HFLM, TaskManager

    def counting(self, on_batch: OnBatch | None) -> Any:
        """The harness's model class, which also reports its progress."""

        class CountingModel(self.HFLM):  # type: ignore[name-defined, misc]
            def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **keywords: Any) -> Any:
                self._done, self._total = 0, len(requests)
                return super()._loglikelihood_tokens(requests, *arguments, **keywords)

            def _model_call(self, inps: Any, *arguments: Any, **keywords: Any) -> Any:
                found = super()._model_call(inps, *arguments, **keywords)
                if on_batch and hasattr(self, "_total"):
                    self._done = min(self._done + len(inps), self._total)
                    on_batch(self._done, self._total)
                return found

        return CountingModel


def _checked(folder: Path, trusted: bool) -> Path:
    """A folder of task files that the user trusts.

    No look at the files can replace that: code comes in by functions, included files, templates,
    pickled data and metric scripts.
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


def _build(harness: _Harness, names: list[str], folder: Path | None) -> list[Any]:
    """Task objects.

    The harness's own list is read, which takes some seconds, only if a name is not in the folder.
    """
    try:
        manager = harness.TaskManager(
            include_path=str(folder) if folder else None, include_defaults=False
        )
        if any(name not in manager.all_tasks for name in names):
            manager = harness.TaskManager(include_path=str(folder) if folder else None)
    except Exception as error:
        raise RequestError(f"task folder {folder}: {_one_line(error)}") from error
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
    words = f"{type(error).__name__}: {_one_line(error)}"
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _result(name: str, found: dict[str, Any]) -> TaskResult:
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, (int, float)) and "," in key
    }
    return TaskResult(
        metrics.get("acc"),
        metrics.get("acc_stderr"),
        metrics.get("acc_norm"),
        metrics.get("acc_norm_stderr"),
        found["versions"].get(name),
        int(found["n-shot"].get(name) or 0),
        int(found["n-samples"][name]["effective"]),
        metrics,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the harness prints to standard output, and its warnings."""
    import warnings

    levels = {name: logging.getLogger(name).level for name in _LOUD}
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
