"""Checkpoints that version 0.1.0 wrote load, and give what they gave then.

Beside each folder lies what that version made of it: logits of the last two positions after
``tokens``; ``dense_logits``, the same with every spiking layer replaced by a dense one of the
weights that its codes stand for; and, in the metadata, SHA-256 of those weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import spikellm
from spikellm.core.fingerprint import fingerprint
from spikellm.models.swap import replace_module
from spikellm.nn.execution import spiking_linears

FOLDERS = sorted(
    path
    for path in (Path(__file__).parents[1] / "fixtures/v1/checkpoints").iterdir()
    if path.is_dir()
)


def loaded(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), "nothing is missing, left over or of another shape"
    return model.eval()


def expected(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors beside a folder, and SHA-256 of weights by layer."""
    with safe_open(f"{folder}.logits.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        return tensors, json.loads(file.metadata()["weights"])


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits[:, -2:]
    return found.float()


def as_dense(model: Any) -> Any:
    """The model with dense layers of the same weights."""
    for name, layer in spiking_linears(model).items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight.data = layer.dense_weight().to(model.dtype)
        replace_module(model, name, dense)
    return model


def test_there_are_some() -> None:
    assert len(FOLDERS) == 6


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_same_logits(folder: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, on a processor where dense layers give the same bits as on the one that the
    logits were made on; a product of bfloat16 is summed in another order on another.
    """
    monkeypatch.setenv("SPIKELLM_KERNELS", kernels)
    known, _ = expected(folder)
    model = loaded(folder)
    found = logits(model, known["tokens"])
    if torch.equal(logits(as_dense(model), known["tokens"]), known["dense_logits"]):
        assert torch.equal(found, known["logits"])
    torch.testing.assert_close(found, known["logits"], atol=0.01, rtol=0)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_same_weights(folder: Path) -> None:
    _, known = expected(folder)
    layers = spiking_linears(loaded(folder))
    assert {name: fingerprint(layer.dense_weight()) for name, layer in layers.items()} == known


@pytest.mark.parametrize("folder", FOLDERS[:1], ids=lambda folder: folder.name)
def test_saved_again_it_keeps_its_record(folder: Path, tmp_path: Path) -> None:
    again = spikellm.save(loaded(folder), None, tmp_path / "again")
    one, two = (
        json.loads((place / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        for place in (folder, again)
    )
    assert [block["name"] for block in one["record"]["blocks"]] == [
        "model.layers.0",
        "model.layers.1",
    ]
    assert one["record"] == two["record"]
    assert one["modules"] == two["modules"]
    known, _ = expected(folder)
    assert torch.equal(
        logits(loaded(again), known["tokens"]), logits(loaded(folder), known["tokens"])
    )
