"""The verb ``eval``: perplexity and zero-shot accuracy of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from spikellm.commands.support.inputs import require_texts
from spikellm.commands.support.options import (
    IN_MODES,
    MODES_FILLED,
    BosChoice,
    LoadOptions,
    Model,
    Seqlen,
)
from spikellm.commands.support.verb import Option, verbs
from spikellm.core import console
from spikellm.core.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class EvalOptions(LoadOptions):
    """What is measured; at least a text or a task.

    Attributes:
        limit: windows of each text, and documents of each task.
    """

    perplexity: Annotated[
        tuple[str, ...],
        Option("Text to measure on. May be repeated.", "NAME|PATH", reads="texts"),
    ] = ()
    tasks: Annotated[
        str | None, Option("Tasks of lm-eval; paper stands for the six of the paper.", "A,B,…")
    ] = None
    task_folder: Annotated[
        str | None,
        Option("Task files (YAML) of your own.", "DIR", filled="a folder", reads="tasks"),
    ] = None
    shots: Annotated[
        int | None, Option("Examples before each question; as the task says by default.")
    ] = None
    batch_size: Annotated[int | None, Option("Sequences at a time in tasks; 1 by default.")] = None
    seqlen: Seqlen = None
    bos: BosChoice = "auto"
    limit: Annotated[
        int | None,
        Option("Use the first N windows of each text and the first N documents of each task."),
    ] = None
    execution: Annotated[
        str | None,
        Option(
            IN_MODES,
            formerly="form",
            filled=MODES_FILLED,
        ),
    ] = None


_DEFAULT = EvalOptions()


@verbs.register("eval")
def evaluate(model: Model, options: EvalOptions = _DEFAULT) -> dict[str, Any]:
    """Measure the perplexity and the zero-shot accuracy of a model, converted or not.

    Examples:

      spikellm eval out/w4a4 --perplexity text.txt --json -

      spikellm eval out/w4a4 --tasks paper --limit 200 --batch-size 8

    Returns:
        ``{"model", "perplexity": {NAME: {"value", "tokens", "windows", "seqlen", "bos"}}, "tasks":
        {NAME: {...}}}``.

    Raises:
        RequestError: nothing to measure, an option that has no effect, and whatever
            :func:`spikellm.perplexity` and :func:`spikellm.zero_shot` raise.
    """
    _require_sense(options)
    limit = options.limit if options.perplexity else None
    require_texts(options.perplexity, limit, options.bos)
    from spikellm import api

    loaded, tokenizer = api.load(
        model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    if options.execution is not None:
        api.set_execution_mode(loaded, options.execution)  # type: ignore[arg-type]
    return {
        "model": model,
        "perplexity": _perplexities(loaded, tokenizer, options),
        "tasks": _scores(loaded, tokenizer, options),
    }


def _require_sense(options: EvalOptions) -> None:
    """Refuse options that would have no effect."""
    if not options.perplexity and options.tasks is None:
        raise RequestError("nothing to measure: give --perplexity or --tasks, or both")
    of_tasks = {
        "--task-folder": options.task_folder,
        "--shots": options.shots,
        "--batch-size": options.batch_size,
    }
    for name, value in of_tasks.items():
        if options.tasks is None and value is not None:
            raise RequestError(f"{name} has no effect without --tasks")
    if options.seqlen is not None and not options.perplexity:
        raise RequestError(
            "--seqlen has no effect without --perplexity; tasks have their own lengths"
        )
    if options.batch_size is not None and options.batch_size < 1:
        raise RequestError(f"--batch-size is {options.batch_size}; expected at least 1")


def _perplexities(model: Any, tokenizer: Any, options: EvalOptions) -> dict[str, Any]:
    from spikellm import api

    found = {}
    for text in options.perplexity:
        with console.bar(text) as update:
            measured = api.perplexity(
                model,
                tokenizer,
                text,
                seqlen=options.seqlen,
                limit=options.limit,
                bos=options.bos,
                on_batch=update,
            )
        found[text] = asdict(measured)
    return found


def _scores(model: Any, tokenizer: Any, options: EvalOptions) -> dict[str, Any]:
    from spikellm import api

    if options.tasks is None:
        return {}
    with console.bar(options.tasks) as update:
        found = api.zero_shot(
            model,
            tokenizer,
            options.tasks,
            folder=options.task_folder,
            limit=options.limit,
            shots=options.shots,
            bos=options.bos,
            batch_size=1 if options.batch_size is None else options.batch_size,
            trust_remote_code=options.trust_remote_code,
            on_batch=update,
        )
    return {name: asdict(score) for name, score in found.items()}


def show(result: dict[str, Any], options: EvalOptions = _DEFAULT) -> None:
    """Print a table of perplexities and one of tasks."""
    limit = options.limit
    where = f"{result['model']}{f', first {limit} windows or documents' if limit else ''}"
    if result["perplexity"]:
        columns = ["text", "perplexity", "tokens", "windows", "window length", "windows start with"]
        rows = [
            [
                name,
                f"{r['value']:.3f}",
                f"{r['tokens']:,}",
                str(r["windows"]),
                str(r["seqlen"]),
                "BOS" if r["bos"] else "text",
            ]
            for name, r in result["perplexity"].items()
        ]
        console.table(f"Perplexity of {where}", columns, rows)
    if result["tasks"]:
        columns = ["task", "accuracy", "normalised accuracy", "shots", "documents", "version"]
        rows = [[name, *_task(r)] for name, r in result["tasks"].items()]
        console.table(f"Tasks, {where}", columns, rows)


def _task(score: dict[str, Any]) -> list[str]:
    return [
        console.with_error(score["accuracy"], score["accuracy_stderr"]),
        console.with_error(score["normalised_accuracy"], score["normalised_accuracy_stderr"]),
        str(score["shots"]),
        str(score["documents"]),
        str(score["version"]),
    ]
