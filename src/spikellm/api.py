"""The package's verbs: load · convert · save · perplexity · generate.

Each does one thing to a model of the model library and returns plain data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from spikellm.algorithms import algorithms
from spikellm.checkpoint.config import SpikeConfig
from spikellm.checkpoint.load import load
from spikellm.checkpoint.save import mark_converted, save, spike_config
from spikellm.checkpoint.training import train, train_by, training_windows
from spikellm.checkpoint.vocabulary import stored_vocabulary
from spikellm.conversion.fingerprint import identity_of
from spikellm.conversion.loop import convert_blocks
from spikellm.conversion.options import ConvertOptions, RunOptions
from spikellm.conversion.plan import adapted, require_supported
from spikellm.conversion.record import BlockRecord, CalibrationRecord
from spikellm.core.devices import find_device
from spikellm.core.errors import NumericalError, RequestError
from spikellm.core.keywords import require_known_keywords
from spikellm.core.offload import offload
from spikellm.data.tokens import bos_token, read_tokens, require_known
from spikellm.data.windows import random_windows, window_length
from spikellm.evaluation.model_report import report
from spikellm.evaluation.perplexity import Perplexity, perplexity
from spikellm.evaluation.zero_shot import zero_shot
from spikellm.models.attention_interface import spiking_attentions
from spikellm.models.prepare import evaluating, prepared
from spikellm.models.summary import ModelSummary, summarize
from spikellm.nn.execution import set_execution_mode, spiking_linears
from spikellm.recipe import Recipe
from spikellm.recipe.load import load_recipe
from spikellm.recipe.settings import require_apart
from spikellm.runtime.generate import generate

__all__ = [
    "Conversion",
    "ModelSummary",
    "Perplexity",
    "convert",
    "generate",
    "load",
    "perplexity",
    "report",
    "save",
    "set_execution_mode",
    "summarize",
    "train",
    "zero_shot",
]

_NUMBERS = 1 << 22  # weights that are looked at at a time


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: the recipe it followed, the error behind each block, what the model
    consists of now.
    """

    recipe: Recipe
    blocks: list[BlockRecord]
    summary: ModelSummary

    @classmethod
    def of(cls, model: Any) -> Conversion:
        """What a converted model says of its own conversion."""
        config = spike_config(model)
        if config is None:
            raise RequestError("the model was not converted")
        return cls(
            config.parsed_recipe(),
            [BlockRecord(**record) for record in (config.record or {}).get("blocks", ())],
            summarize(model),
        )


def convert(
    model: Any,
    tokenizer: Any,
    recipe: str | Path | Recipe = "w4a4-t2",
    calibration: str | Path | None = None,
    **options: Unpack[ConvertOptions],
) -> Conversion:
    """Turn a causal language model into a spike-driven one, in place.

    After an error the model is as it was; after one in training it is converted, and not trained.

    Args:
        model, tokenizer: as :func:`load` or the model library gives them.
        recipe: name of a preset, a YAML file, or a recipe.
        calibration, samples, seqlen, seed: replace the recipe's own values; what was used is saved
            with the model.
        settings: ``key=value`` changes to the recipe.
        device: where blocks are converted; each goes there and back. By default they stay where
            they are.
        journal: folder for finished blocks, from which an interrupted conversion goes on to the
            same bytes.
        on_block: called after every block.
        on_stage: called with a few words before each step that takes a while.
        store: folder to keep hidden states of the calibration text in, instead of RAM; or a
            function that is told what the conversion needs and returns one.
        replaces: noted in the journal: the result may take the place of what is there.
        original: where to load the original anew, or a second copy of it, for a recipe that trains
            after conversion; by default where the model was loaded from.
        on_step: called after every update of such a training.
        trust_remote_code: run Python code that comes with the original.
        shared: keeps the full-precision stream from one conversion of a model to the next; copies
            of one model may share it, other models may not.

    Raises:
        RecipeError: the recipe is not valid.
        RequestError: unknown text, algorithm or device, a text shorter than a window, a model that
            is converted already, a journal of something else.
        UnsupportedModelError: the family cannot be converted exactly.
        NumericalError: a weight or a hidden state is NaN or infinite; the tensor or block is named.
        TypeError: a keyword that is not known.
    """
    require_known_keywords(
        "convert", options, ("recipe", "calibration", *ConvertOptions.__annotations__)
    )
    resolved = resolve_recipe(
        recipe,
        calibration,
        options.get("samples"),
        options.get("seqlen"),
        options.get("seed"),
        options.get("settings", ()),
    )
    device = find_device(options.get("device") or next(model.parameters()).device)
    if spike_config(model) is not None or spiking_linears(model):
        raise RequestError("the model is converted already; load the original")
    stage = options.get("on_stage") or (lambda _: None)
    effective, left_out = adapted(model, resolved)
    for note in left_out:
        stage(note)
    with evaluating(model):
        require_supported(model, effective)
    _require_finite_weights(model)
    parameters = sum(one.numel() for one in model.parameters())
    stage(f"reading and tokenizing {resolved.calibration.text}")
    windows = calibration_windows(model, tokenizer, resolved)
    identity = identity_of(model, windows, resolved, device)
    run = RunOptions.of(options, device, identity)
    stage(
        f"checking that blocks run alone as they run in the model, then converting {len(windows)}"
        f" windows of {windows.shape[1]} tokens"
    )
    with evaluating(model, stays=True), prepared(model, attention=effective.attention.spiking):
        algorithm = algorithms[effective.algorithm.name]()
        records, notes = convert_blocks(model, windows, effective, algorithm, run)
    text = CalibrationRecord(
        windows=windows.shape[0],
        seqlen=windows.shape[1],
        sha256=identity["text"],
        bos=bos_token(tokenizer, resolved.calibration.bos) is not None,
        notes=notes,
    )
    record = {
        "blocks": [block.model_dump() for block in records],
        "calibration": text.model_dump(),
        "notes": left_out,
        "parameters": parameters,
        **{key: identity[key] for key in ("versions", "model", "device")},
    }
    _mark(model, resolved, record)
    if resolved.training is not None:
        trained_on = training_windows(model, tokenizer, resolved)
        train_by(model, resolved, trained_on, run.journal, options)
    return Conversion(resolved, records, summarize(model))


def _mark(model: Any, recipe: Recipe, record: dict[str, Any]) -> None:
    """Let a converted model know how it was converted."""
    shapes = {name: list(spikes.shape) for name, spikes in spiking_attentions(model).items()}
    layers = spiking_linears(model)
    sizes = {name: list(layer.sizes) for name, layer in layers.items() if layer.sizes}
    vocabulary = stored_vocabulary(model)
    config = SpikeConfig(
        recipe.model_dump(mode="json"), list(layers), record, shapes, sizes, vocabulary
    )
    mark_converted(model, config)


def resolve_recipe(
    recipe: str | Path | Recipe,
    calibration: str | Path | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    settings: Iterable[str] = (),
) -> Recipe:
    """A recipe with some of its values replaced.

    Unknown algorithms and fields that are set twice are refused here, before any work.
    """
    if isinstance(settings, str):
        raise RequestError(
            f"settings is {settings!r}; expected a list of key=value, such as [{settings!r}]"
        )
    values = {
        "calibration.text": None if calibration is None else str(calibration),
        "calibration.samples": samples,
        "calibration.seqlen": seqlen,
        "seed": seed,
    }
    given, settings = (
        {key: value for key, value in values.items() if value is not None},
        list(settings),
    )
    require_apart(settings, given)
    resolved = load_recipe(recipe, settings).replaced(given)
    algorithms[resolved.algorithm.name]
    return resolved


def calibration_windows(model: Any, tokenizer: Any, recipe: Recipe) -> Tensor:
    """Calibration tokens of a recipe, ``(windows, seqlen)``."""
    text = recipe.calibration
    bos, length = bos_token(tokenizer, text.bos), window_length(model.config, text.seqlen)
    tokens = read_tokens(tokenizer, text.text, "calibration")
    require_known(tokens, model)
    return random_windows(tokens, length, text.samples, recipe.seed, text.text, bos)


def is_made_from(
    config: SpikeConfig, model: Any, tokenizer: Any, recipe: Recipe, device: torch.device
) -> bool:
    """Whether a finished conversion is what converting this model with this recipe would give: same
    model, text, recipe, versions and kind of device.
    """
    identity, record = (
        identity_of(model, calibration_windows(model, tokenizer, recipe), recipe, device),
        dict(config.record or {}),
    )
    found = {
        "recipe": config.recipe,
        "text": record["calibration"]["sha256"],
        **{key: record.get(key) for key in ("versions", "model", "device")},
    }
    return found == identity


def _require_finite_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        count = 0
        rows = torch.atleast_1d(parameter.detach())
        for part in rows.split(max(1, _NUMBERS // max(1, rows[:1].numel()))):
            count += part.numel() - int(torch.isfinite(part).sum())
        offload(parameter)
        if count:
            raise NumericalError(
                f"weight {name} holds {count} NaN or infinite values; a model is converted only"
                " whole, so get an undamaged copy"
            )
