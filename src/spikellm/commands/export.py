"""The verb ``export``: a converted model for another tool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from spikellm.commands.support.options import Model, Trust
from spikellm.commands.support.verb import Argument, Option, verbs
from spikellm.core import console
from spikellm.core.errors import RequestError
from spikellm.core.files import folder_when_done, require_free, require_outside

_RESULT = "export.json"


def format_names() -> Iterable[str]:
    """Formats that can be written, those of plugins too."""
    from spikellm.export import exporters

    return exporters.names()


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written.

    Attributes:
        layers: full names; all layers that the format can express by default.
        force: overwrite the export in OUT.
    """

    layers: Annotated[
        tuple[str, ...],
        Option(
            "Write this layer, for example model.layers.0.mlp.down_proj; all by default. May be"
            " repeated.",
            "NAME",
            name="layer",
        ),
    ] = ()
    force: Annotated[bool, Option("Overwrite the export in OUT.")] = False
    trust_remote_code: Trust = False


_DEFAULT = ExportOptions()


@verbs.register("export")
def export(
    model: Model,
    out: Annotated[Path, Argument("Folder to write.", "OUT", writes="folder")],
    format: Annotated[str, Option("Format to write.", "NAME", names=format_names)],
    options: ExportOptions = _DEFAULT,
) -> dict[str, Any]:
    """Write a converted model in the format of another tool.

    Example: spikellm export out/w4a4 out/nir --format nir --layer model.layers.0.mlp.down_proj

    Returns:
        What ``export.json`` in the folder holds: ``{"model", "format", "files": [{"file", …}],
        "not_expressed"}``.

    Raises:
        RequestError: there is no such format or layer, the format cannot express the model, or OUT
            holds what is read, or is not empty and no export to overwrite.
        DependencyError: what the format is written with is not installed.
    """
    from spikellm import api
    from spikellm.export import Source, exporters

    format_names()
    exporter = exporters[format]()
    require_outside(out, model)
    require_free(out.resolve(), overwrite=options.force, mark=_RESULT)
    console.note(f"loading {model}")
    loaded, tokenizer = api.load(model, trust_remote_code=options.trust_remote_code)
    if reason := exporter.refuses(loaded):
        raise RequestError(f"{model}: {reason}")
    console.note(f"writing {out}")
    with folder_when_done(out, overwrite=options.force, mark=_RESULT) as folder:
        files = exporter.export(Source(loaded, tokenizer, options.layers), folder)
        result = {
            "model": model,
            "format": format,
            "files": files,
            "not_expressed": list(exporter.not_expressed),
        }
        console.write_json(result, str(folder / _RESULT))
    return result


def show(result: dict[str, Any], out: Path) -> None:
    """Print how much was written, and what the format leaves out."""
    count = len(result["files"])
    print(f"{out}: {count} {result['format']} file{'' if count == 1 else 's'}")
    if left := result["not_expressed"]:
        print(f"not expressed: {'; '.join(left)}")
