"""Zero-shot and few-shot tasks with the evaluation harness of the field (lm-eval), which is used as
it is: its prompts, metrics and task versions.

Task files are programs, not data: they name Python functions, dataset loaders and metrics, and
their templates are evaluated. A folder of them is read only where the user says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict, Unpack

from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.core.extras import require
from spikellm.core.keywords import require_known_keywords
from spikellm.data.tokens import bos_token, require_bos
from spikellm.evaluation.harness import (
    Harness,
    OnBatch,
    build_tasks,
    checked_folder,
    one_line,
    quiet,
)
from spikellm.models.prepare import evaluating

PAPER = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
"""The six tasks of the paper."""


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
    bos: str
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
        bos: whether prompts start with the BOS token, which is lm-eval's ``add_bos_token``: as the
            tokenizer has it (``auto``), ``always`` or ``never``.
        batch_size: sequences at a time; 1 by default.
        trust_remote_code: run what the files of ``folder`` name, and Python code that comes with
            the model; needed for every folder.
        on_batch: called with ``(sequences done, sequences in all)``; the harness runs some of them
            together.

    Returns:
        Results by task; a name that stands for several tasks gives them all.

    Raises:
        RequestError: an unknown task, a missing or untrusted folder, a number below its least, or
            BOS tokens that the harness cannot add.
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
    folder = None if given is None else checked_folder(Path(given), trusted)
    added = _added_bos(tokenizer, options.get("bos", "auto"))
    with quiet(), evaluating(model):
        require("tasks", "eval", "lm_eval")
        harness = Harness()
        built = build_tasks(harness, names, folder)
        wrapped = harness.counting(options.get("on_batch"))(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            trust_remote_code=trusted,
            **({} if added is None else {"add_bos_token": added}),
        )
        try:
            found = harness.scores(wrapped, built, shots, limit)
        except Exception as error:
            raise SpikeLLMError(
                f"the harness failed on {', '.join(names)}: {type(error).__name__}:"
                f" {one_line(error)}"
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


def _added_bos(tokenizer: Any, bos: str) -> bool | None:
    """What lm-eval is told of BOS tokens; None for its own way, which is the tokenizer's.

    It adds them through the tokenizer alone.
    """
    require_bos(bos)
    if bos == "always" and bos_token(tokenizer, "auto") is None:
        raise RequestError(
            "bos is 'always', and the tokenizer adds no BOS token by itself, so that the harness"
            " cannot; leave it at auto"
        )
    return {"always": True, "never": False}.get(bos)


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
