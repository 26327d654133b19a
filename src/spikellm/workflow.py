"""What a command does beyond one call: load, convert, save and tell how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spikellm import api, console
from spikellm.calibration import ranks
from spikellm.calibration.progress import forget, is_journal, is_leftover, replaces
from spikellm.calibration.records import OnBlock, Progress
from spikellm.checkpoint.config import read_config
from spikellm.checkpoint.huggingface import spike_config
from spikellm.errors import RequestError
from spikellm.files import remove_leftovers, require_folder_name, require_free, require_outside, write_text
from spikellm.inputs import require_models, require_texts
from spikellm.modeling.devices import find_device
from spikellm.plain_data import difference_in_words
from spikellm.profiling.energy import load_table
from spikellm.profiling.page import render, require_page
from spikellm.profiling.report import Report
from spikellm.recipe import Recipe
from spikellm.resources import STORES, choose_store


def convert_to_folder(
    model: str, out: Path, recipe: str | Recipe, calibration: str | None, *, samples: int | None = None, seqlen: int | None = None, seed: int | None = None,
    device: str | None = None, resume: bool = False, settings: Iterable[str] = (), overwrite: bool = False, store: str = "auto", trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Convert a model from a folder or the hub into a folder, keeping finished blocks beside it until all is done.

    Args:
        store: where hidden states of the calibration text are kept: ``ram``, ``disk`` (beside OUT), or ``auto``, by what is free.

    Raises:
        RequestError: OUT holds what is read; it is not empty, and no model to overwrite; or an interrupted conversion lies beside it and neither ``resume`` nor ``overwrite`` says what to do.
    """
    resolved = api.resolve_recipe(recipe, calibration, samples, seqlen, seed, settings)  # before anything slow
    out = out.resolve()
    if not out.name:
        raise RequestError(f"OUT is {out}; give a folder with a name")
    require_folder_name(out)
    if out == Path(model).resolve():
        raise RequestError(f"OUT is the model itself ({out}); choose another folder")
    require_outside(out, model, resolved.calibration.text, *([] if isinstance(recipe, Recipe) else [recipe]))
    if store not in STORES:
        raise RequestError(f"--store {store!r}: expected {', '.join(STORES)}")
    place = find_device(device) if device else None
    partial = out.with_name(f"{out.name}.partial")
    there = read_config(out) if resume and not overwrite else None
    same = there is not None and there.recipe == resolved.model_dump(mode="json")
    if there is not None and not same and not is_journal(partial):
        raise RequestError(
            f"{out} holds a finished conversion with another {difference_in_words('recipe', there.recipe, resolved.model_dump(mode='json'))}; "
            "give the same settings, choose another OUT, or overwrite it with --force instead of --resume"
        )
    if not same:
        overwrite = _look_at_target(out, partial, resume=resume, overwrite=overwrite)
    console.note(f"loading {model}")
    loaded, tokenizer = api.load(model, trust_remote_code=trust_remote_code)
    if same and there is not None:
        if api.is_made_from(there, loaded, tokenizer, resolved, place or next(loaded.parameters()).device):
            console.note(f"{out} is finished already")
            told = _told(out, resolved, api.Conversion.of(api.load(out, trust_remote_code=trust_remote_code)[0]))
            if ranks.first():  # a result that does not load would need its journal
                forget(partial)
                remove_leftovers(out)
            return told
        overwrite = _look_at_target(out, partial, resume=resume, overwrite=overwrite)
    result = api.convert(
        loaded, tokenizer, resolved, device=place, journal=partial, replaces=overwrite, on_block=report_block(), on_stage=console.note,
        store=lambda needs: choose_store(needs, store, partial),
    )  # fmt: skip
    told = _told(out, resolved, result)
    if resolved.attention.spiking:
        console.note(f"attention spikes in {told['attention']} modules")
    dense = told["dense"]
    console.note(
        f"left dense: {', '.join(dense[:6])}{f' and {len(dense) - 6} more' if len(dense) > 6 else ''}"
        if dense
        else "no linear layer is left dense"
    )
    console.note(f"writing {out}")
    if ranks.first():
        api.save(loaded, tokenizer, out, overwrite=overwrite)
        forget(partial)
    ranks.wait()
    return told


def _look_at_target(out: Path, partial: Path, *, resume: bool, overwrite: bool) -> bool:
    """Refuse what must not be touched, clear away what is to be forgotten; returns whether OUT may be overwritten."""
    if resume and overwrite:
        raise RequestError("--resume goes on with an interrupted conversion and --force forgets it; give one of them")
    interrupted = is_journal(partial)
    if interrupted and not (resume or overwrite):
        raise RequestError(f"{partial} holds an interrupted conversion; go on with --resume, or start afresh with --force")
    if not interrupted and partial.exists() and not is_leftover(partial):
        raise RequestError(f"{partial} is in the way: finished blocks are kept there; move it or choose another OUT")
    overwrite = overwrite or (resume and replaces(partial))
    require_free(out, overwrite=overwrite)
    ranks.wait()  # all have looked
    if ranks.first():
        if not (interrupted and resume):
            forget(partial)
        remove_leftovers(out)
    ranks.wait()
    return overwrite


def _told(out: Path, resolved: Recipe, result: api.Conversion) -> dict[str, Any]:
    summary = result.summary
    dense = [layer.name for layer in summary.layers if not layer.spiking]
    return {
        "out": str(out), "recipe": resolved.name, "layers": summary.spiking_layers, "dense": dense, "average_steps": summary.average_steps,
        "attention": len(summary.attentions), "weight_ratio": summary.weight_bytes / max(summary.dense_bytes, 1), "blocks": [asdict(block) for block in result.blocks],
    }  # fmt: skip


def report_block() -> OnBlock:
    """A callback that prints a line for each block: error, time, memory."""

    def on_block(progress: Progress) -> None:
        record = progress.record
        kept = "  (from the interrupted run)" if progress.resumed else ""
        if not record.layers:
            console.note(f"block {progress.index + 1}/{progress.total}  skipped, as the recipe says")
            return
        for note in record.notes:
            console.note(note)
        console.note(
            f"block {progress.index + 1}/{progress.total}  loss {record.loss:.3e} ({record.relative_loss:.2%})  {progress.seconds:.1f} s  peak {console.size(progress.peak_memory)}{kept}"
        )

    return on_block


def report_to_page(
    model: str, text: str, out: Path | None, *, beside: Iterable[str] = (), tokens: int = 4096, seqlen: int | None = None, energy_table: str | None = None,
    device: str | None = None, trust_remote_code: bool = False,
) -> Report:  # fmt: skip
    """Measure a model on a text and write the page of its report; no page where ``out`` is None.

    Raises:
        RequestError: the folder of ``out`` does not exist, and whatever :func:`spikellm.report` raises.
        DependencyError: what pages are made with is not installed.
    """
    console.check_file_target("--out", out)
    if out is not None:
        require_page()
    beside = list(beside)
    require_texts([text])
    load_table(energy_table)
    require_models(beside)

    def others() -> Iterator[tuple[str, Any]]:
        for other in beside:
            console.note(f"measuring {other}")
            yield Path(other).name, api.load(other, device=device, trust_remote_code=trust_remote_code)[0]

    console.note(f"loading {model}")
    loaded, tokenizer = api.load(model, device=device, trust_remote_code=trust_remote_code)
    console.note(f"measuring perplexity and counting operations on {text}")
    name = Path(model).name
    found = api.report(loaded, tokenizer, text, tokens=tokens, seqlen=seqlen, name=name, beside=others(), energy_table=energy_table)
    if out is not None:
        write_text(out, render(found))
    return found


def inspect_model(model: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Layers, bits, steps and sizes as plain data."""
    loaded, _ = api.load(model, trust_remote_code=trust_remote_code)
    summary, config = api.summarize(loaded), spike_config(loaded)
    return {
        "model": model, "kind": summary.kind, "recipe": config.recipe if config else None, "record": config.record if config else None,
        "average_steps": summary.average_steps, "additive_share": summary.additive_share, "bytes": {"weights": summary.weight_bytes, "dense": summary.dense_bytes, "total": summary.total_bytes},
        "layers": [asdict(layer) for layer in summary.layers], "attention": [asdict(attention) for attention in summary.attentions],
    }  # fmt: skip


def rotations_in_words(recipe: dict[str, Any]) -> str:
    """What a recipe rotates, fused or while the model runs; nothing if nothing."""
    options, attention = recipe.get("rotation", {}), recipe.get("attention", {})
    parts = [
        "the residual stream (fused)" if options.get("residual") else "",
        "heads of V (fused)" if options.get("value_output") else "",
        f"inputs of {' and '.join(options['online'])} layers" if options.get("online") else "",
        "Q and K" if attention.get("rotate") else "",
    ]
    return ", ".join(filter(None, parts))


def show_inspection(result: dict[str, Any]) -> None:
    """Print what :func:`inspect_model` found."""
    rows = []
    for layer in result["layers"]:
        spikes = f"{layer['neuron']} {layer['spike_bits']}" if layer["neuron"] else "-"
        steps = f"{layer['average_steps']:.3f}" if layer["neuron"] or layer["salient_columns"] else "-"
        salient = f"{layer['salient_channels']} ({layer['own_range_channels']})" if layer["salient_channels"] else "-"
        if layer["salient_columns"]:
            salient = f"{layer['salient_columns']} of weights" if salient == "-" else f"{salient}, {layer['salient_columns']} of weights"
        bits = str(layer["weight_bits"]) if layer["weight_code"] in (None, "affine") else f"{layer['weight_code']} {layer['weight_bits']}"
        shape = f"{layer['out_features']} × {layer['in_features']}"
        turned = str(layer["rotated_channels"] or "-")
        rows.append([layer["name"], shape, bits, spikes, steps, salient, turned, console.size(layer["weight_bytes"])])
    recipe = result["recipe"]["name"] if result["recipe"] else "not converted"
    console.table(
        f"{result['model']}: {result['kind']}, {recipe}",
        ["layer", "out × in", "weight bits", "spike bits", "steps", "salient (own range)", "rotated", "bytes"],
        rows,
    )
    sizes = result["bytes"]
    if result["recipe"]:
        console.out.print(
            f"average steps {result['average_steps']:.3f}; additive share of the products of converted layers {result['additive_share']:.3f}; converted weights {console.size(sizes['weights'])}, {sizes['weights'] / sizes['dense']:.3f} of 16 bits a weight; "
            f"whole model {console.size(sizes['total'])}", highlight=False, soft_wrap=True,
        )  # fmt: skip
        if rotated := rotations_in_words(result["recipe"]):
            console.out.print(f"rotated: {rotated}", highlight=False, soft_wrap=True)
        if result["attention"]:
            one = result["attention"][0]
            row = (
                f"a cached token and key-value head takes {one['cache_bytes']} bytes, {one['dense_cache_bytes']} at 16 bits"
                if one["cache_bytes"]
                else "K and V are not cached as spikes"
            )
            console.out.print(
                f"attention spikes in {len(result['attention'])} modules: query {one['query_bits']}, key {one['key_bits']}, value {one['value_bits']} bits; {row}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        else:
            console.out.print("attention does not spike", highlight=False)
    else:
        console.out.print(f"whole model {console.size(sizes['total'])}; no spiking layer", highlight=False)
