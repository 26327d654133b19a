"""llama.cpp beside a model of this package: which program, and which file it runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from spikellm.commands.support.llama_turn import Peer
from spikellm.commands.support.verb import Option
from spikellm.core import console
from spikellm.core.errors import RequestError

if TYPE_CHECKING:
    from spikellm.export.gguf_types import FileTypes


def _types() -> tuple[str, ...]:
    from spikellm.export.gguf_types import TYPES

    return TYPES


@dataclass(frozen=True, kw_only=True)
class LlamaBenchOptions:
    """What of llama.cpp is run beside."""

    llama_bench: Annotated[
        str | None, Option("Time llama.cpp beside it, with this llama-bench.", "PROGRAM")
    ] = None
    gguf: Annotated[
        Path | None,
        Option("What llama.cpp runs; written from the original by default.", "FILE", reads="files"),
    ] = None
    gguf_type: Annotated[
        str | None,
        Option("Of layers in the file that is written; by default near the model's.", names=_types),
    ] = None
    gguf_vocabulary_type: Annotated[
        str | None,
        Option("Of embedding and output projection; by default near the model's.", names=_types),
    ] = None


@contextmanager
def peer_beside(
    model: str, original: str | None, options: LlamaBenchOptions, trust_remote_code: bool = False
) -> Iterator[Peer | None]:
    """What llama.cpp runs beside ``model``; the file is written first, and removed afterwards, if
    none is given. None without a program.

    Raises:
        RequestError: no such program, nothing to write a file from, options without effect.
        DependencyError: a file is to be written, and the ``gguf`` package is not installed.
    """
    if options.llama_bench is None:
        _require_none(options)
        yield None
        return
    program = _program(options.llama_bench)
    if options.gguf is not None:
        _require_no_types(options)
        if not options.gguf.is_file():
            raise RequestError(f"{options.gguf} is no file; expected a GGUF file of the original")
        yield Peer(program, options.gguf, str(options.gguf), None)
        return
    source = _source(model, original)
    types = chosen_types(model, options)
    with tempfile.TemporaryDirectory() as folder:
        name = f"{Path(source).name}-{types.layers}-{types.vocabulary}.gguf"
        file = Path(folder) / name
        console.note(f"{source}: writing a GGUF file ({types})")
        yield Peer(program, file, name, write_apart(source, file, types, trust_remote_code))


def write_apart(
    source: str, file: Path, types: FileTypes, trust_remote_code: bool = False
) -> dict[str, int]:
    """Write a GGUF file in a process of its own, so that the model is out of memory again.

    Returns:
        How many matrices have which type.
    """
    from spikellm.commands.support.timing import apart

    return apart(source, _write, source, file, types, trust_remote_code)


def _write(source: str, file: Path, types: FileTypes, trust_remote_code: bool) -> dict[str, int]:
    from spikellm import api
    from spikellm.export.gguf_model import write_gguf

    model, _ = api.load(source, trust_remote_code=trust_remote_code)
    return write_gguf(model, file, types)


def chosen_types(model: str, options: LlamaBenchOptions) -> FileTypes:
    """The types that are asked for, else those next to what a model stores.

    Raises:
        RequestError: an unknown type.
        DependencyError: the ``gguf`` package is not installed.
    """
    from spikellm.export.gguf_types import FileTypes, require_gguf, require_types

    near = types_near(model)
    types = FileTypes(
        options.gguf_type or near.layers, options.gguf_vocabulary_type or near.vocabulary
    )
    require_types(types)
    require_gguf()
    return types


def types_near(model: str) -> FileTypes:
    """Types of llama.cpp next to the formats of a converted model: ternary weights for ternary
    ones, else its smallest type with as many bits; ``f16`` for what is not coded.
    """
    from spikellm.checkpoint.config import read_config
    from spikellm.export.gguf_types import FileTypes

    config = read_config(Path(model))
    if config is None:
        return FileTypes("f16", "f16")
    recipe = config.parsed_recipe()
    bits = int(getattr(recipe.weights, "bits", 16))
    layers = "tq2_0" if recipe.weights.format == "ternary" else _near(bits, offset=True)
    table = recipe.vocabulary
    coded = table is not None and "head" in table.layers
    return FileTypes(layers, _near(table.bits, offset=False) if table and coded else "f16")


def _near(bits: int, *, offset: bool) -> str:
    """A type by the bits of a value; ``offset`` takes those that have a smallest value beside the
    scale of each block.
    """
    if bits > 8:
        return "f16"
    return "q8_0" if bits > 5 else f"q{max(bits, 4)}_{int(offset)}"


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        problem = "is no program that can be run" if Path(name).exists() else "is not there"
        raise RequestError(
            f"llama-bench {name} {problem}; give the path of llama.cpp's llama-bench, or a name on"
            " the search path"
        )
    return found


def _source(model: str, original: str | None) -> str:
    from spikellm.checkpoint.config import read_config

    if original is None and read_config(Path(model)) is not None:
        raise RequestError(
            f"llama.cpp cannot run {model}, which is converted; give --original, from which a file"
            " is written for it, or --gguf, such a file"
        )
    source = original or model
    if read_config(Path(source)) is not None:
        raise RequestError(f"{source} is converted too; give --gguf, a file that llama.cpp can run")
    return source


def _require_none(options: LlamaBenchOptions) -> None:
    given = {"gguf": options.gguf, "gguf-type": options.gguf_type}
    given["gguf-vocabulary-type"] = options.gguf_vocabulary_type
    for name, value in given.items():
        if value is not None:
            raise RequestError(
                f"--{name} has no effect without --llama-bench, which reads the file"
            )


def _require_no_types(options: LlamaBenchOptions) -> None:
    for name in (options.gguf_type, options.gguf_vocabulary_type):
        if name is not None:
            raise RequestError(
                f"GGUF type {name} has no effect on {options.gguf}, which is there; give one of"
                " both"
            )
