"""What a command does beyond one call: load, convert, save and tell how far it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spikellm import api
from spikellm.checkpoint.config import read_config
from spikellm.commands.storage import STORES, choose_store
from spikellm.conversion.journal import forget, is_journal, is_leftover, replaces
from spikellm.conversion.record import OnBlock, Progress
from spikellm.core import console, distributed
from spikellm.core.devices import find_device
from spikellm.core.errors import RequestError
from spikellm.core.files import remove_leftovers, require_folder_name, require_free, require_outside
from spikellm.core.io import difference_in_words
from spikellm.recipe import Recipe


def convert_to_folder(
    model: str,
    out: Path,
    recipe: str | Recipe,
    calibration: str | None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    resume: bool = False,
    settings: Iterable[str] = (),
    overwrite: bool = False,
    store: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Convert a model from a folder or the hub into a folder, keeping finished blocks beside it
    until all is done.

    Args:
        store: where hidden states of the calibration text are kept: ``ram``, ``disk`` (beside OUT),
            or ``auto``, by what is free.

    Raises:
        RequestError: OUT holds what is read; it is not empty, and no model to overwrite; or an
            interrupted conversion lies beside it and neither ``resume`` nor ``overwrite`` says what
            to do.
    """
    resolved = api.resolve_recipe(
        recipe, calibration, samples, seqlen, seed, settings
    )  # before anything slow
    out = out.resolve()
    if not out.name:
        raise RequestError(f"OUT is {out}; give a folder with a name")
    require_folder_name(out)
    if out == Path(model).resolve():
        raise RequestError(f"OUT is the model itself ({out}); choose another folder")
    require_outside(
        out, model, resolved.calibration.text, *([] if isinstance(recipe, Recipe) else [recipe])
    )
    if store not in STORES:
        raise RequestError(f"--store {store!r}: expected {', '.join(STORES)}")
    place = find_device(device) if device else None
    partial = out.with_name(f"{out.name}.partial")
    there = read_config(out) if resume and not overwrite else None
    same = there is not None and there.recipe == resolved.model_dump(mode="json")
    if there is not None and not same and not is_journal(partial):
        raise RequestError(
            f"{out} holds a finished conversion with another"
            f" {difference_in_words('recipe', there.recipe, resolved.model_dump(mode='json'))};"
            " give the same settings, choose another OUT, or overwrite it with --force instead of"
            " --resume"
        )
    if not same:
        overwrite = _look_at_target(out, partial, resume=resume, overwrite=overwrite)
    console.note(f"loading {model}")
    loaded, tokenizer = api.load(model, trust_remote_code=trust_remote_code)
    if same and there is not None:
        if api.is_made_from(
            there, loaded, tokenizer, resolved, place or next(loaded.parameters()).device
        ):
            console.note(f"{out} is finished already")
            told = _told(
                out,
                resolved,
                api.Conversion.of(api.load(out, trust_remote_code=trust_remote_code)[0]),
            )
            if distributed.is_main():  # a result that does not load would need its journal
                forget(partial)
                remove_leftovers(out)
            return told
        overwrite = _look_at_target(out, partial, resume=resume, overwrite=overwrite)
    result = api.convert(
        loaded,
        tokenizer,
        resolved,
        device=place,
        journal=partial,
        replaces=overwrite,
        on_block=report_block(),
        on_stage=console.note,
        store=lambda needs: choose_store(needs, store, partial),
    )
    told = _told(out, resolved, result)
    if resolved.attention.spiking:
        console.note(f"attention spikes in {told['attention']} modules")
    dense = told["dense"]
    console.note(
        "left dense:"
        f" {', '.join(dense[:6])}{f' and {len(dense) - 6} more' if len(dense) > 6 else ''}"
        if dense
        else "no linear layer is left dense"
    )
    console.note(f"writing {out}")
    if distributed.is_main():
        api.save(loaded, tokenizer, out, overwrite=overwrite)
        forget(partial)
    distributed.barrier()
    return told


def _look_at_target(out: Path, partial: Path, *, resume: bool, overwrite: bool) -> bool:
    """Refuse what must not be touched, clear away what is to be forgotten.

    Returns whether OUT may be overwritten.
    """
    if resume and overwrite:
        raise RequestError(
            "--resume goes on with an interrupted conversion and --force forgets it; give one of"
            " them"
        )
    interrupted = is_journal(partial)
    if interrupted and not (resume or overwrite):
        raise RequestError(
            f"{partial} holds an interrupted conversion; go on with --resume, or start afresh with"
            " --force"
        )
    if not interrupted and partial.exists() and not is_leftover(partial):
        raise RequestError(
            f"{partial} is in the way: finished blocks are kept there; move it or choose"
            " another OUT"
        )
    overwrite = overwrite or (resume and replaces(partial))
    require_free(out, overwrite=overwrite)
    distributed.barrier()  # all have looked
    if distributed.is_main():
        if not (interrupted and resume):
            forget(partial)
        remove_leftovers(out)
    distributed.barrier()
    return overwrite


def _told(out: Path, resolved: Recipe, result: api.Conversion) -> dict[str, Any]:
    summary = result.summary
    dense = [layer.name for layer in summary.layers if not layer.spiking]
    return {
        "out": str(out),
        "recipe": resolved.name,
        "layers": summary.spiking_layers,
        "dense": dense,
        "average_steps": summary.average_steps,
        "attention": len(summary.attentions),
        "weight_ratio": summary.weight_bytes / max(summary.dense_bytes, 1),
        "blocks": [block.model_dump() for block in result.blocks],
    }


def report_block() -> OnBlock:
    """A callback that prints a line for each block: error, time, memory."""

    def on_block(progress: Progress) -> None:
        record = progress.record
        kept = "  (from the interrupted run)" if progress.resumed else ""
        if not record.layers:
            console.note(
                f"block {progress.index + 1}/{progress.total}  skipped, as the recipe says"
            )
            return
        for note in record.notes:
            console.note(note)
        console.note(
            f"block {progress.index + 1}/{progress.total}  loss {record.loss:.3e}"
            f" ({record.relative_loss:.2%})  {progress.seconds:.1f} s  peak"
            f" {console.size(progress.peak_memory)}{kept}"
        )

    return on_block
