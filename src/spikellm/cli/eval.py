"""The command ``spikellm eval``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from spikellm import console
from spikellm.cli.application import app
from spikellm.cli.options import Device, Json, Model, Seqlen, Trust


@app.command("eval")
def evaluate(
    model: Model,
    perplexity: Annotated[list[str], typer.Option("--perplexity", metavar="NAME|PATH", help="Text to measure on. May be repeated.")],
    seqlen: Seqlen = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use the first N windows only.")] = None,
    form: Annotated[
        str | None, typer.Option("--form", help="Sum spikes merged (default), stepped or binary; the result is the same.")
    ] = None,
    json: Json = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure the perplexity of a model, converted or not.

    Example: spikellm eval out/w4a4 --perplexity text.txt --json -
    """
    console.check_json_target(json)
    from spikellm import api

    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    if form:
        api.set_form(loaded, form)  # type: ignore[arg-type]
    results: dict[str, Any] = {}
    for source in perplexity:
        with console.bar(source) as update:
            results[source] = asdict(api.perplexity(loaded, tokenizer, source, seqlen=seqlen, limit=limit, on_batch=update))
    if json:
        console.write_json({"model": model, "perplexity": results, "tasks": {}}, json)
    if json != "-":
        rows = [[name, f"{r['value']:.3f}", f"{r['tokens']:,}", str(r["windows"]), str(r["seqlen"])] for name, r in results.items()]
        part = f", first {limit} windows" if limit else ""
        console.table(f"Perplexity of {model}{part}", ["text", "perplexity", "tokens", "windows", "window length"], rows)
