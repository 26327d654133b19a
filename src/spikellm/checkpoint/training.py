"""Train a loaded model, and let it know how it was trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from spikellm.checkpoint.original import original_of
from spikellm.checkpoint.save import spike_config
from spikellm.conversion.fingerprint import identity_of
from spikellm.conversion.journal import Journal
from spikellm.conversion.record import TrainingRecord
from spikellm.core.devices import find_device
from spikellm.core.errors import RequestError
from spikellm.core.keywords import require_known_keywords
from spikellm.data.tokens import bos_token, read_tokens, require_known
from spikellm.models.families import longest_window
from spikellm.recipe import Recipe
from spikellm.recipe.load import load_recipe
from spikellm.recipe.settings import require_apart
from spikellm.training.run import TrainingRun, TrainOptions, train_model
from spikellm.training.text import TrainingText, training_text


def train(
    model: Any,
    tokenizer: Any,
    original: Any | str | Path | None = None,
    calibration: str | Path | None = None,
    **options: Unpack[TrainOptions],
) -> TrainingRecord | None:
    """Train a converted model in place with its spikes in the loop; its integers stay as they are.

    After an error the model is as it was.

    Args:
        model, tokenizer: as :func:`load` gives them.
        original: what it was converted from, as a folder, a name on the hub or a model; by default
            where it was loaded from before it was converted.
        calibration: text to train on; the recipe's own by default.
        steps: updates, in place of the recipe's; none change nothing.
        settings: ``key=value`` changes to the recipe's section ``training``.
        device: where it is trained; it goes there and back.
        journal: folder for the state, from which an interrupted training goes on to the same bytes.
        on_step: called after every update.
        on_stage: called with a few words before each step that takes a while.
        trust_remote_code: run Python code that comes with the original.
        replaces: noted in the journal: the result may take the place of what is there.

    Returns:
        What training did; None where no update was asked for.

    Raises:
        RecipeError: the section is not valid.
        RequestError: the model is not converted or was trained, the original is another model, or
            the text is too short.
        NumericalError: a loss is NaN or infinite at ever lower rates.
        TypeError: a keyword that is not known.
    """
    require_known_keywords("train", options, ("calibration", *TrainOptions.__annotations__))
    recipe = training_recipe(model, calibration, options.get("steps"), options.get("settings", ()))
    device = find_device(options.get("device") or next(model.parameters()).device)
    text, journal = training_windows(model, tokenizer, recipe), None
    if (folder := options.get("journal")) is not None:
        identity = identity_of(model, text.windows, recipe, device)
        journal = Journal(Path(folder), identity, replaces=options.get("replaces", False))
    return train_by(model, recipe, text, journal, {**options, "original": original})


def training_recipe(
    model: Any,
    calibration: str | Path | None = None,
    steps: int | None = None,
    settings: Iterable[str] = (),
) -> Recipe:
    """The recipe of a converted model with what training it is to go by."""
    config = spike_config(model)
    if config is None:
        raise RequestError("the model was not converted; convert it first")
    if (config.record or {}).get("training"):
        raise RequestError(
            "the model was trained already; train the converted one that it was made from, with"
            " more steps"
        )
    recipe = config.parsed_recipe()
    if recipe.training is None:
        recipe = recipe.replaced({"training": "end-to-end"})
    values = {"calibration.text": calibration and str(calibration), "training.steps": steps}
    given = {key: value for key, value in values.items() if value is not None}
    settings = list(settings)
    require_apart(settings, given)
    return load_recipe(recipe, settings).replaced(given)


def training_windows(model: Any, tokenizer: Any, recipe: Recipe) -> TrainingText:
    """What a recipe trains on."""
    text, options = recipe.calibration, recipe.training
    assert options is not None
    longest = longest_window(model.config) or options.seqlen
    tokens = read_tokens(tokenizer, text.text, "calibration")
    require_known(tokens, model)
    bos = bos_token(tokenizer, text.bos)
    return training_text(tokens, min(options.seqlen, longest), options, recipe.seed, text.text, bos)


def train_by(
    model: Any, recipe: Recipe, text: TrainingText, journal: Journal | None, options: Any
) -> TrainingRecord | None:
    """Train a converted model, and let it know how."""
    config = spike_config(model)
    assert config is not None
    assert recipe.training is not None
    trust = options.get("trust_remote_code", False)
    record = train_model(
        model,
        lambda: original_of(model, options.get("original"), trust_remote_code=trust),
        recipe.training,
        text,
        TrainingRun(
            find_device(options.get("device") or next(model.parameters()).device),
            journal,
            options.get("on_step") or (lambda _: None),
            options.get("on_stage") or (lambda _: None),
        ),
    )
    if record is not None:
        config.recipe = recipe.model_dump(mode="json")
        config.record = {**config.record, "training": record.model_dump(mode="json")}
    return record
