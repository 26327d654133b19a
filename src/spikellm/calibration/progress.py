"""Journal of a conversion: finished blocks on disk, so that an interrupted run goes on where it stopped and ends in the same bytes.

Activations are not kept: on resuming, the streams are run through the finished blocks again, which gives them back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikellm.errors import RequestError
from spikellm.files import cannot_write, write_atomically

_MANIFEST = "manifest.json"


class Journal:
    """Finished blocks of one conversion in one folder.

    Args:
        folder: created with the first finished block.
        identity: what must be equal for a resumed run to end in the same bytes (recipe, fingerprints, versions).

    Raises:
        RequestError: the folder holds a journal of something else; names the field that differs.
    """

    class Entry(NamedTuple):
        """A finished block: tensors of its layers under full names, and its record."""

        tensors: dict[str, Tensor]
        record: dict[str, Any]

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        if is_journal(folder):
            self._compare(_read_manifest(folder / _MANIFEST), json.loads(json.dumps(identity)))

    def read(self, index: int) -> Entry | None:
        """Tensors and record of a finished block; None if it is not there."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return self.Entry({key: file.get_tensor(key) for key in list(file.keys())}, json.loads(file.metadata()["record"]))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise RequestError(f"{path} is damaged ({error}); delete it to convert that block again") from None

    def write(self, index: int, modules: Mapping[str, nn.Module], dense: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished block; the first one creates the folder and its manifest."""
        if not is_journal(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(self.folder, error) from None
            text = json.dumps(self._identity, indent=1)
            write_atomically(self.folder / _MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
        tensors = {f"{name}.{key}": tensor.contiguous() for name, module in modules.items() for key, tensor in module.state_dict().items()}
        tensors.update(dense)
        write_atomically(self._path(index), lambda path: save_file(tensors, path, metadata={"record": json.dumps(record)}))

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _compare(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                raise RequestError(
                    f"{self.folder} holds an interrupted conversion with another {key} ({_short(found.get(key))}, now {_short(expected.get(key))}); "
                    "resume with the same settings, or start afresh with --force"
                )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise RequestError(f"{path} is damaged; delete the folder, or start afresh with --force")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def is_journal(folder: Path) -> bool:
    """Whether a folder holds an interrupted conversion."""
    return (folder / _MANIFEST).is_file()
