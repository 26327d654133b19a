"""Checks of a model folder before it is loaded, so that damage is named instead of surfacing as a
stack of someone else's errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from spikellm.checkpoint.declared import Held, require_bounded
from spikellm.checkpoint.references import require_own_files
from spikellm.core.errors import CheckpointError, RequestError
from spikellm.core.io import read_json

_HEADER_LIMIT = 100_000_000  # as the safetensors library has it
_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}  # of the others one or less


def check_folder(folder: Path) -> Held:
    """Check that a folder holds a whole model: a configuration, and every shard at its full length.

    Gives what they hold.

    Raises:
        RequestError: not a model folder.
        CheckpointError: a shard is missing or truncated, or the configuration declares sizes far
            beyond what is there; names it.
    """
    if not folder.is_dir():
        raise RequestError(
            f"{folder} is a file, expected a folder with config.json and safetensors shards"
        )
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"folder {folder} has no config.json; expected a model folder as save_pretrained"
            " writes it"
        )
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"{folder}/config.json is not valid JSON ({error}); restore it"
        ) from None
    held = sum_of(_shards(folder))
    require_bounded(config, held, f"{folder}/config.json")
    require_own_files(folder, config)
    return held


def sum_of(shards: list[Path]) -> Held:
    """What shards hold together, each of its full length."""
    found = [read_shard(shard).held for shard in shards]
    return Held(*(sum(numbers) for numbers in zip(*found, strict=True))) if found else Held(0, 0, 0)


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


class Shard(NamedTuple):
    """What a shard's header says: types of its tensors as they are named there (``F32``, ``U8``),
    and how much there is.
    """

    types: dict[str, str]
    held: Held


def read_shard(shard: Path) -> Shard:
    """The header of a shard, whose length is right.

    Raises:
        CheckpointError: it is missing, damaged or truncated.
    """
    if not shard.is_file():
        raise CheckpointError(
            f"shard {shard} is missing though the index names it; copy it there again"
        )
    size = shard.stat().st_size
    try:
        with open(shard, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        types = {name: str(entry["dtype"]) for name, entry in tensors.items()}
        elements = sum(
            (entry["data_offsets"][1] - entry["data_offsets"][0]) // _BYTES.get(types[name], 1)
            for name, entry in tensors.items()
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        UnicodeDecodeError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"shard {shard} is damaged or truncated ({error}); copy it again"
        ) from None
    if size != 8 + length + end:
        raise CheckpointError(
            f"shard {shard} has {size} bytes, its header declares {8 + length + end}; it is"
            " truncated or damaged, copy it again"
        )
    return Shard(types, Held(len(tensors), min(elements, end), end))
