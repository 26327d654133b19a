"""What a command reads: told from what it writes, and looked for before the work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spikellm.errors import RequestError
from spikellm.files import Source, exists

_TEXT_SUFFIXES = (".txt", ".jsonl")  # what is read of a folder of texts
_TASK_SUFFIXES = (".yaml", ".yml")  # and of a folder of tasks


def sources(
    *,
    models: Iterable[str | None] = (),
    texts: Iterable[str | None] = (),
    recipes: Iterable[str] = (),
    settings: Iterable[str] = (),
    files: Iterable[str | None] = (),
    tasks: str | None = None,
) -> list[Source]:
    """The files and folders of this machine among what a command is told to read; names of sets, presets and models on the hub are none.

    Args:
        recipes, settings: recipes are read, and the calibration text that each names.
        files: single files, of energies for example.
        tasks: a folder of task files.
    """
    from spikellm.presets import load_recipe, preset_names

    named, own = list(texts), [recipe for recipe in recipes if recipe not in preset_names()]
    for recipe in recipes:
        try:
            named.append(load_recipe(recipe, settings).calibration.text)
        except RequestError:  # told where the recipe is used
            continue
    found = [Source(Path(name)) for name in (*models, *own, *files) if name]
    found += [Source(Path(name), _TEXT_SUFFIXES) for name in named if name and exists(Path(name)) and not _is_named(name)]
    return found + ([Source(Path(tasks), _TASK_SUFFIXES)] if tasks else [])


def _is_named(text: str) -> bool:
    from spikellm.calibration.text import NAMED

    return text in NAMED
