"""What a command reads: told from what it writes, and looked for before the work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spikellm.core.errors import RequestError
from spikellm.core.files import Source, exists
from spikellm.data.text_files import FOLDER_SUFFIXES

_TASK_SUFFIXES = (".yaml", ".yml")  # what is read of a folder of tasks


def sources(
    *,
    models: Iterable[str] = (),
    texts: Iterable[str] = (),
    recipes: Iterable[str] = (),
    settings: Iterable[str] = (),
    files: Iterable[str] = (),
    tasks: Iterable[str] = (),
) -> list[Source]:
    """The files and folders of this machine among what a command is told to read.

    Names of sets, presets and models on the hub are none.

    Args:
        recipes, settings: recipes are read, and the calibration text that each names.
        files: single files, of energies for example.
        tasks: folders of task files.
    """
    own, named = _recipe_files(recipes, settings)
    found = [Source(Path(name)) for name in (*models, *own, *files)]
    found += [
        Source(Path(name), FOLDER_SUFFIXES)
        for name in (*texts, *named)
        if exists(Path(name)) and not _is_named(name)
    ]
    return found + [Source(Path(name), _TASK_SUFFIXES) for name in tasks]


def _recipe_files(recipes: Iterable[str], settings: Iterable[str]) -> tuple[list[str], list[str]]:
    """Recipes that are files, and the calibration texts that recipes name."""
    own: list[str] = []
    named: list[str] = []
    for recipe in recipes:
        from spikellm.recipe.load import load_recipe, preset_names

        if recipe not in preset_names():
            own.append(recipe)
        try:
            named.append(load_recipe(recipe, settings).calibration.text)
        except RequestError:  # told where the recipe is used
            continue
    return own, named


def require_texts(texts: Iterable[str], limit: int | None = None, bos: str = "auto") -> None:
    """Ask for all texts before the work on the first.

    Raises:
        RequestError: one is neither the name of a set nor there, ``limit`` leaves nothing of it, or
            ``bos`` is no choice.
    """
    from spikellm.data.datasets import require_source
    from spikellm.data.tokens import require_bos

    for text in texts:
        require_source(text)
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}; expected at least one window")
    require_bos(bos)


def require_models(models: Iterable[str]) -> None:
    """Ask for all models before the work on the first.

    Raises:
        RequestError: one is here, and no model.
        CheckpointError: one is here, and damaged.
        DependencyError: one is not here, and the hub has no such model or cannot be reached.
    """
    from spikellm.checkpoint.load import require_model

    for model in models:
        require_model(model)


def _is_named(text: str) -> bool:
    from spikellm.data.datasets import NAMED

    return text in NAMED
