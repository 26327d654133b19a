"""The command line: parse, call, print. No logic."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spikellm import console
from spikellm.errors import RequestError

app = typer.Typer(
    name="spikellm",
    help="Turn a pretrained language model into a spike-driven one, see what that costs, and run it.\n\nTry `spikellm demo` first: it needs no download.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a model, converted or not.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the result as JSON to a file, or to standard output (-).")
]
Device = Annotated[str | None, typer.Option("--device", help="Where to run, for example cpu or cuda:0.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe field, for example weights.bits=3. May be repeated.")
]


Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="NAME|PATH", help="wikitext2, c4, ptb (hub), stdlib (built in), a .txt or .jsonl file, or a folder."
    ),
]
EnergyTable = Annotated[
    str | None, typer.Option("--energy-table", metavar="NAME|FILE", help="Energies per operation; horowitz-45nm by default.")
]
Samples = Annotated[int | None, typer.Option("--samples", help="Windows of calibration text.")]
Seqlen = Annotated[int | None, typer.Option("--seqlen", help="Tokens of a window; min(2048, the model's maximum) by default.")]


@app.callback(invoke_without_command=True)
def main_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,
) -> None:
    """Options that stand before a command."""
    if context.invoked_subcommand is None and not version:
        typer.echo(context.get_help())
        raise typer.Exit
    if version:
        import spikellm

        typer.echo(spikellm.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Keep the converted models in this folder.")] = None,
    json: Json = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what --out holds.")] = False,
) -> None:
    """Convert the bundled model with several recipes and compare them. No download, about a minute.

    Example: spikellm demo --out spiking
    """
    console.check_json_target(json)
    from spikellm.demo import run

    result = run(out, overwrite=force)
    if json:
        console.write_json(result, json)
    if json != "-":
        from spikellm.demo import show

        show(result)


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; appears once it is complete.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Name of a preset (see `spikellm recipes`) or a YAML file.")] = "w4a4-t2",
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides windows and random controls.")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion to OUT, or start one.")] = False,
    settings: Set = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT, and forget an interrupted conversion to it.")] = False,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a model to spikes and save it.

    Examples:

      spikellm convert ./model out/w4a4 --recipe w4a4-t2 --calibration text.txt

      spikellm convert organisation/model out/w8a8 --recipe w8a8 --samples 64 --set weights.group_size=128
    """
    console.check_json_target(json)
    from spikellm.workflow import convert_to_folder

    result = convert_to_folder(
        model, out, recipe, calibration, samples=samples, seqlen=seqlen, seed=seed, device=device, resume=resume, settings=settings or (), overwrite=force,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if json:
        console.write_json(result, json)
    if json != "-":
        typer.echo(
            f"{out}: {result['layers']} spiking layers, {result['average_steps']:.3f} steps on average, weights at {result['weight_ratio']:.3f} of 16 bits"
        )


@app.command()
def compare(
    model: Model,
    recipes: Annotated[str, typer.Option("--recipes", metavar="A,B,…", help="Presets or YAML files, separated by commas.")],
    perplexity: Annotated[list[str], typer.Option("--perplexity", metavar="NAME|PATH", help="Text to measure on. May be repeated.")],
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="1,2,…", help="Convert once for each; mean and deviation.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use the first N windows only.")] = None,
    settings: Set = None,
    table: Annotated[str, typer.Option("--table", help="How to print: table, markdown, csv or latex.")] = "table",
    energy_table: EnergyTable = None,
    device: Device = None,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a model with several recipes and print one table. Nothing is saved.

    Examples:

      spikellm compare ./model --recipes rtn-w4a4,w4a4-t2 --calibration train.txt --perplexity test.txt

      spikellm compare ./model --recipes pbllm-90,ternary-1.7 --seeds 2,3,4 --perplexity test.txt --table latex > table.tex
    """
    console.check_json_target(json)
    style = console.table_style(table)
    from spikellm import comparison

    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else []
    except ValueError:
        raise RequestError(f"--seeds {seeds!r}: expected whole numbers separated by commas, for example 1,2,3") from None
    result = comparison.compare(
        model,
        [name for name in recipes.split(",") if name],
        perplexity,
        calibration,
        samples=samples,
        seqlen=seqlen,
        seeds=numbers,
        limit=limit,
        settings=settings or (),
        energy_table=energy_table,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if json:
        console.write_json(result, json)
    if json != "-":
        comparison.show(result, style)


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


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 for greedy; above 0 to sample.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Decides what is sampled.")] = 0,
    json: Json = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text.

    Example: spikellm generate out/w4a4 "The history of the" --max-new-tokens 40
    """
    from spikellm import api

    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    text = api.generate(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if json:
        console.write_json({"model": model, "prompt": prompt, "text": text}, json)
    if json != "-":
        typer.echo(text)


@app.command()
def inspect(model: Model, json: Json = None, trust_remote_code: Trust = False) -> None:
    """Show layers, bits, steps and sizes of a model, converted or not.

    Example: spikellm inspect out/w4a4
    """
    from spikellm.workflow import inspect_model, show_inspection

    result = inspect_model(model, trust_remote_code=trust_remote_code)
    if json:
        console.write_json(result, json)
    if json != "-":
        show_inspection(result)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Preset or file to print as YAML; all presets are listed without it.")] = None,
    settings: Set = None,
    json: Json = None,
) -> None:
    """List the presets, or print one recipe in full as YAML.

    Example: spikellm recipes w4a4-t2 > mine.yaml
    """
    from spikellm.presets import load_recipe, preset_names

    if name is None and settings:
        raise RequestError("--set changes one recipe; name it, for example `spikellm recipes w4a4-t2 --set weights.bits=3`")
    if name is not None:
        recipe = load_recipe(name, settings or ())
        if json:
            console.write_json(recipe.model_dump(mode="json"), json)
        if json != "-":
            typer.echo(recipe.to_yaml(named=False), nl=False)
        return
    presets = {preset: load_recipe(preset).description for preset in preset_names()}
    if json:
        console.write_json(presets, json)
    if json != "-":
        console.table("Presets", ["name", "what it does"], [[preset, text] for preset, text in presets.items()], left=2)


@app.command()
def doctor(json: Json = None) -> None:
    """Show versions, processor features and the kernels in use."""
    from spikellm.doctor import examine

    result = examine()
    if json:
        console.write_json(result, json)
    if json != "-":
        console.table("spikellm doctor", ["what", "found"], [[key, str(value)] for key, value in result.items()], left=2)
