"""Adapters of peft beside spiking layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.core.errors import RequestError
from spikellm.nn.rotation import Rotated

peft = pytest.importorskip("peft", reason="the extra 'lora' is not installed")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(folder: Path, **options: Any) -> Any:
    model, _ = spikellm.load(folder)
    return peft.get_peft_model(
        model, peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, **options})
    )


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """What is no adapter's, by the names that it has without adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


@pytest.fixture(scope="module")
def rotated_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Two blocks with rotations before layers, and spiking attention."""
    model, tokenizer = first_blocks()
    spikellm.convert(model, tokenizer, "best-w4a4", str(text_file), samples=2, seqlen=32)
    return spikellm.save(model, tokenizer, tmp_path_factory.mktemp("rotated") / "model")


@pytest.mark.parametrize("kind", ["converted_folder", "rotated_folder"])
def test_adapters_are_trained_and_integers_are_not(
    kind: str, request: pytest.FixtureRequest, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    model = adapted(folder)
    if kind == "rotated_folder":
        assert isinstance(model.base_model.model.model.layers[0].mlp.down_proj.base_layer, Rotated)
    before = {name: value.clone() for name, value in state_of(model).items()}
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in trained)
    assert losses[-1] < losses[0] - 0.1
    assert state_of(model).keys() == before.keys() == spikellm.load(folder)[0].state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())

    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(spikellm.load(folder)[0], tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_new_adapter_changes_nothing(converted_folder: Path, tokens: torch.Tensor) -> None:
    plain, _ = spikellm.load(converted_folder)
    with torch.no_grad():
        assert torch.equal(adapted(converted_folder).eval()(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora is a form of LoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_what_needs_weights_is_refused(
    converted_folder: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        adapted(converted_folder, **options)


def test_merging_is_refused(converted_folder: Path) -> None:
    with pytest.raises(RequestError, match="cannot be merged"):
        adapted(converted_folder).merge_and_unload()


def test_trainers_accept_the_model(converted_folder: Path) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    validate_quantization_for_training(adapted(converted_folder))
