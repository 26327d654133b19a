"""Journal of a conversion: finished blocks on disk, so that an interrupted run goes on where it
stopped and ends in the same bytes.

Activations are not kept: on resuming, the streams are run through the finished blocks again, which
gives them back exactly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikellm.conversion.record import Manifest, explain
from spikellm.core.errors import CheckpointError, RequestError
from spikellm.core.files import cannot_write, write_atomically
from spikellm.core.io import PlainDataError, difference_in_words, parse_json, read_json
from spikellm.core.offload import release

_MANIFEST, _REPLACES = "manifest.json", "replaces"


class Journal:
    """Finished blocks of one conversion in one folder.

    Args:
        folder: created with the first finished block.
        identity: what must be equal for a resumed run to end in the same bytes, as
            :class:`spikellm.conversion.record.Manifest` has it.
        replaces: the result takes the place of what is there; a resumed run may do so too.

    Raises:
        RequestError: the folder holds a journal of something else; names the field that differs.
    """

    class Entry(NamedTuple):
        """A finished block as its file has it, unchecked: tensors of its layers under full names,
        and its record.
        """

        tensors: dict[str, Tensor]
        record: Any

    def __init__(self, folder: Path, identity: dict[str, Any], *, replaces: bool = False) -> None:
        self.folder, self._replaces = folder, replaces
        self._manifest = Manifest.model_validate(identity)
        if is_journal(folder):
            self._compare(_read_manifest(folder / _MANIFEST))

    def read(self, index: int) -> Entry | None:
        """Tensors and record of a finished block; None if it is not there."""
        if not self.path(index).exists():
            return None
        with self._reading(index) as file:
            return self.Entry(
                {key: file.get_tensor(key) for key in list(file.keys())},
                parse_json(file.metadata()["record"]),
            )

    def write(
        self,
        index: int,
        modules: Mapping[str, nn.Module],
        dense: Mapping[str, Tensor],
        record: dict[str, Any],
    ) -> None:
        """Keep a finished block; the first one creates the folder and its manifest."""
        self.begin()
        tensors = {
            f"{name}.{key}": tensor.contiguous()
            for name, module in modules.items()
            for key, tensor in module.state_dict().items()
        }
        tensors.update(dense)
        write_atomically(
            self.path(index),
            lambda path: save_file(tensors, path, metadata={"record": json.dumps(record)}),
        )

    def begin(self) -> None:
        """Create the folder and its manifest, where they are not there yet."""
        if is_journal(self.folder):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._replaces:
                (self.folder / _REPLACES).touch()
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        text = self._manifest.model_dump_json(indent=1)
        write_atomically(
            self.folder / _MANIFEST, lambda path: path.write_text(text, encoding="utf-8")
        )

    def hand_back(
        self, index: int, modules: Mapping[str, nn.Module], dense: Mapping[str, nn.Parameter]
    ) -> None:
        """Let modules and parameters of a finished block, all on the CPU, read their tensors from
        the journal's file, so that they need no memory of their own.
        """
        with self._reading(index) as file:
            for name, module in modules.items():
                module.load_state_dict(
                    {key: file.get_tensor(f"{name}.{key}") for key in module.state_dict()},
                    assign=True,
                )
                release(module)
            for name, parameter in dense.items():
                parameter.data = file.get_tensor(name)

    @contextmanager
    def _reading(self, index: int) -> Iterator[Any]:
        path = self.path(index)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it to convert that block again"
            ) from None

    def path(self, index: int) -> Path:
        """The file of a block."""
        return self.folder / f"block-{index:05d}.safetensors"

    def _compare(self, other: Manifest) -> None:
        expected = self._manifest.model_dump()
        for key, found in other.model_dump().items():
            if found != expected[key]:
                raise RequestError(
                    f"{self.folder} holds an interrupted conversion with another"
                    f" {difference_in_words(key, found, expected[key])}; resume with the same"
                    " settings, or start afresh with --force"
                )


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        problem = explain(error)
    except (PlainDataError, OSError) as error:
        problem = " ".join(str(error).split())
    raise RequestError(
        f"{path} is damaged ({problem}); delete the folder, or start afresh with --force"
    )


def is_journal(folder: Path) -> bool:
    """Whether a folder holds an interrupted conversion."""
    return (folder / _MANIFEST).is_file()


def is_leftover(folder: Path) -> bool:
    """Whether a folder holds nothing but what a conversion leaves that was interrupted before its
    first block was finished.
    """
    return folder.is_dir() and all(
        path.name == _REPLACES or path.name.startswith((".", "states-"))
        for path in folder.iterdir()
    )


def replaces(folder: Path) -> bool:
    """Whether an interrupted conversion was to take the place of what is there."""
    return (folder / _REPLACES).exists()


def forget(folder: Path) -> None:
    """Remove a journal: it is gone under its name at once, so that an interruption leaves no half
    of it.
    """
    gone = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    if not folder.exists():
        return
    try:
        folder.rename(gone)
    except OSError as error:
        raise cannot_write(folder, error) from None
    shutil.rmtree(gone, ignore_errors=True)
