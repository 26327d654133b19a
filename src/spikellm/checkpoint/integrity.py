"""Checks of a model folder before it is loaded, so that damage is named instead of surfacing as a
stack of someone else's errors.
"""

from __future__ import annotations

from pathlib import Path

from spikellm.checkpoint.outline import require_few_layers
from spikellm.checkpoint.references import require_own_files
from spikellm.checkpoint.shards import Shards, read_headers
from spikellm.core.errors import CheckpointError, RequestError
from spikellm.core.io import read_json


def check_folder(folder: Path) -> Shards:
    """Check that a folder holds a whole model: a configuration, and every shard at its full length.

    Gives what they hold.

    Raises:
        RequestError: not a model folder.
        CheckpointError: a shard is missing or truncated, or the configuration declares far more
            layers than there are tensors; names it.
    """
    if not folder.is_dir():
        raise RequestError(
            f"{folder} is a file, expected a folder with config.json and safetensors shards, or a"
            " GGUF file"
        )
    if not (folder / "config.json").is_file():
        inside = min(folder.glob("*.gguf"), default=None)
        hint = "" if inside is None else f", or the file {inside.name} in it"
        raise RequestError(
            f"folder {folder} has no config.json; expected a model folder as save_pretrained"
            f" writes it{hint}"
        )
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"{folder}/config.json is not valid JSON ({error}); restore it"
        ) from None
    shards = read_headers(_shards(folder))
    require_few_layers(config, shards, f"{folder}/config.json")
    require_own_files(folder, config)
    return shards


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{index} is damaged (expected JSON with a weight_map); restore it"
            ) from None
        bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if bad:
            raise CheckpointError(
                f"{index} names {bad[0]!r}, which is no file name in this folder; refused"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"found {others[0]}, which may run code when read; convert it to safetensors first"
            if others
            else "copy the weights there"
        )
        raise CheckpointError(
            f"folder {folder} has no model.safetensors (nor an index of shards); {hint}"
        )
    return [single]
