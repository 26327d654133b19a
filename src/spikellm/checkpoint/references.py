"""What files of a model folder name: nothing outside the folder is read, and no code or other model
is fetched, because a configuration says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikellm.core.errors import CheckpointError, RequestError
from spikellm.core.io import leaves, read_json

_TOKENIZER = "tokenizer_config.json"
_NOT_READ = {
    "special_tokens_map_file",
    "tokenizer_file",
}  # where older tokenizers note a path of the machine that wrote them


def require_own_files(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder whose files name others: attention kernels of the hub, the base model of an
    adapter, a tokenizer's files elsewhere.

    Raises:
        RequestError: it is an adapter, or asks for code from the hub.
        CheckpointError: its tokenizer names files that are not in it.
    """
    if (folder / "adapter_config.json").exists():
        raise RequestError(
            f"{folder} holds adapter_config.json, so part of its weights would come from elsewhere;"
            " merge the adapter into its model first"
        )
    for place, value in leaves(config):
        key = ".".join(place)
        if isinstance(value, str) and "implementation" in key and "/" in value:
            raise RequestError(
                f"{folder}/config.json asks for {key} {value!r}, which is code from the hub; take"
                " the line out of config.json"
            )
    if not (folder / _TOKENIZER).exists():
        return
    try:
        names = read_json(folder / _TOKENIZER)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder}/{_TOKENIZER} is not valid JSON ({error}); restore it"
        ) from None
    for key, value in names.items() if isinstance(names, dict) else ():
        listed = value if isinstance(value, list) and key.endswith("_files") else [value]
        if key in _NOT_READ or not (
            key.endswith(("_file", "_files")) or key in {"vocab", "merges"}
        ):
            continue
        for name in listed:
            if isinstance(name, str) and (
                Path(name).name != name or name in {"", ".."} or "\\" in name
            ):
                raise CheckpointError(
                    f"{folder}/{_TOKENIZER} names {name!r} under {key}, which is no file name in"
                    " this folder; refused"
                )
