"""The command ``spikellm eval``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from spikellm.cli.application import app
from spikellm.cli.options import Device, Json, Model, Seqlen, Trust, filled
from spikellm.commands.inputs import require_texts, sources
from spikellm.core import console
from spikellm.core.errors import RequestError


@app.command("eval")
def evaluate(
    model: Model,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            "--perplexity", metavar="NAME|PATH", help="Text to measure on. May be repeated."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="A,B,…",
            help="Tasks of lm-eval; paper stands for the six of the paper.",
        ),
    ] = None,
    task_folder: Annotated[
        str | None,
        typer.Option(
            "--task-folder",
            metavar="DIR",
            callback=filled("a folder"),
            help="Task files (YAML) of your own.",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", help="Examples before each question; as the task says by default."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences at a time in tasks; 1 by default.")
    ] = None,
    seqlen: Seqlen = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            help="Use the first N windows of each text and the first N documents of each task.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            callback=filled("merged, stepped or binary"),
            help="Sum spikes merged (default), stepped or binary; the result is the same.",
        ),
    ] = None,
    json: Json = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure the perplexity and the zero-shot accuracy of a model, converted or not.

    Examples:

      spikellm eval out/w4a4 --perplexity text.txt --json -

      spikellm eval out/w4a4 --tasks paper --limit 200 --batch-size 8
    """
    console.check_json_target(
        json, sources(models=[model], texts=perplexity or (), tasks=task_folder)
    )
    if not perplexity and tasks is None:
        raise RequestError("nothing to measure: give --perplexity or --tasks, or both")
    alone = [
        name
        for name, value in (
            ("--task-folder", task_folder),
            ("--shots", shots),
            ("--batch-size", batch_size),
        )
        if value is not None
    ]
    if tasks is None and alone:
        raise RequestError(f"{alone[0]} has no effect without --tasks")
    if seqlen is not None and not perplexity:
        raise RequestError(
            "--seqlen has no effect without --perplexity; tasks have their own lengths"
        )
    if batch_size is not None and batch_size < 1:
        raise RequestError(f"--batch-size is {batch_size}; expected at least 1")
    require_texts(perplexity or (), limit if perplexity else None)
    from spikellm import api

    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    if form is not None:
        api.set_execution_mode(loaded, form)  # type: ignore[arg-type]
    results: dict[str, Any] = {}
    for source in perplexity or ():
        with console.bar(source) as update:
            results[source] = asdict(
                api.perplexity(
                    loaded, tokenizer, source, seqlen=seqlen, limit=limit, on_batch=update
                )
            )
    scores: dict[str, Any] = {}
    if tasks is not None:
        with console.bar(tasks) as update:
            found = api.zero_shot(
                loaded,
                tokenizer,
                tasks,
                folder=task_folder,
                limit=limit,
                shots=shots,
                batch_size=1 if batch_size is None else batch_size,
                trust_remote_code=trust_remote_code,
                on_batch=update,
            )
        scores = {name: asdict(result) for name, result in found.items()}
    if json:
        console.write_json({"model": model, "perplexity": results, "tasks": scores}, json)
    if json != "-":
        part = f", first {limit} windows or documents" if limit else ""
        if results:
            rows = [
                [name, f"{r['value']:.3f}", f"{r['tokens']:,}", str(r["windows"]), str(r["seqlen"])]
                for name, r in results.items()
            ]
            console.table(
                f"Perplexity of {model}{part}",
                ["text", "perplexity", "tokens", "windows", "window length"],
                rows,
            )
        if scores:
            rows = [
                [
                    name,
                    console.with_error(r["accuracy"], r["accuracy_stderr"]),
                    console.with_error(r["normalised_accuracy"], r["normalised_accuracy_stderr"]),
                    str(r["shots"]),
                    str(r["documents"]),
                    str(r["version"]),
                ]
                for name, r in scores.items()
            ]
            console.table(
                f"Tasks, {model}{part}",
                ["task", "accuracy", "normalised accuracy", "shots", "documents", "version"],
                rows,
            )
