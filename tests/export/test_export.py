"""Exporters are a kind of part: by name, from a file of their own, through the verb."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import BUNDLED, first_blocks
from spikellm.__main__ import main
from spikellm.commands.export import ExportOptions, export
from spikellm.core.errors import DependencyError, RequestError
from spikellm.export import Source, exporters
from spikellm.export.nir import NirExporter, segment_weights
from spikellm.export.nir_simulation import read_graph
from spikellm.nn.execution import spiking_linears

LAYER = "model.layers.1.mlp.down_proj"


def test_one_layer(converted_folder: Path, tmp_path: Path) -> None:
    options = ExportOptions(layers=(LAYER,))
    result = export(str(converted_folder), tmp_path / "out", "nir", options)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["export.json", f"{LAYER}.nir"]
    assert json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8")) == result
    model, _ = spikellm.load(converted_folder)
    weights = segment_weights(spiking_linears(model)[LAYER])
    written = read_graph(tmp_path / "out" / f"{LAYER}.nir").nodes["synapses"].weight
    assert torch.equal(torch.from_numpy(written).long(), weights)
    assert result["files"] == [
        {
            "file": f"{LAYER}.nir",
            "layer": LAYER,
            "inputs": weights.shape[1],
            "sums": weights.shape[0],
        }
    ]
    assert result["not_expressed"]


def test_all_layers(converted_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = spikellm.load(converted_folder)
    files = NirExporter().export(Source(model, tokenizer), tmp_path)
    assert [one["layer"] for one in files] == list(spiking_linears(model))
    assert {one["file"] for one in files} == {path.name for path in tmp_path.iterdir()}


def test_layers_behind_rotations_have_their_family_s_names(text_file: Path, tmp_path: Path) -> None:
    model, tokenizer = first_blocks(2)
    rotated = ["transforms=[{name: online-rotation, layers: [down]}]"]
    spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=32, settings=rotated
    )
    (found,) = NirExporter().export(Source(model, tokenizer, (LAYER,)), tmp_path)
    assert found["layer"] == LAYER
    assert LAYER not in spiking_linears(model)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (
            "converted",
            ["--format", "nri"],
            "unknown format 'nri', did you mean 'nir'? (valid: compressed-tensors, gguf, nir",
        ),
        ("converted", ["--format", "nir", "--layer", "down"], "unknown layer 'down'"),
        ("bundled", ["--format", "nir"], "no layer codes its inputs as spikes"),
        ("converted", [], "--format"),
    ],
)
def test_wrong_requests(
    model: str,
    arguments: list[str],
    words: str,
    converted_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = converted_folder if model == "converted" else BUNDLED
    assert main(["export", str(folder), str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_export_alone_is_overwritten(
    converted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["export", str(converted_folder), str(out), "--format", "nir", "--layer", LAYER]
    assert main(command) == 0
    assert "1 nir file" in capsys.readouterr().out
    assert main(command) == 2
    assert main([*command, "--force", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "nir"
    (out / "export.json").unlink()
    assert main([*command, "--force"]) == 2
    assert main(["export", str(out), str(out), "--format", "nir", "--force"]) == 2


def test_what_is_missing_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikellm.api, "load", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(DependencyError, match=r"spikellm\[nir\]"):
        export(str(BUNDLED), tmp_path / "out", "nir")


@pytest.fixture
def counts() -> Iterator[str]:
    """A format of its own, as a file or a plugin would enter it."""

    @exporters.register("counts")
    class Counts:
        not_expressed: tuple[str, ...] = ("everything but a number",)

        def refuses(self, model: Any) -> str | None:
            return None if spiking_linears(model) else "it does not spike"

        def export(self, source: Source, folder: Path) -> list[dict[str, Any]]:
            (folder / "count").write_text(str(len(spiking_linears(source.model))))
            return [{"file": "count"}]

    yield "counts"
    exporters._entries.pop("counts")


def test_another_format(
    counts: str, converted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "One of: compressed-tensors, counts, gguf, nir." in said
    result = export(str(converted_folder), tmp_path / "out", counts)
    assert result["files"] == [{"file": "count"}]
    assert (tmp_path / "out" / "count").read_text() == "35"
    with pytest.raises(RequestError, match="it does not spike"):
        export(str(BUNDLED), tmp_path / "other", counts)
