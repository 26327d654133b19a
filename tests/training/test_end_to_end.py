"""What training end to end changes of a model, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import BUNDLED
from interruptions import bytes_of
from spikellm.core.errors import NumericalError, RequestError
from spikellm.training.end_to_end import EndToEnd

QUICK = ("training.seqlen=32", "training.batch=2", "training.held_out=2")
FROZEN = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def trained(folder: Path, text: Path, steps: int = 2, *more: str, **keywords: Any) -> Any:
    model, tokenizer = spikellm.load(folder)
    said = {setting.partition("=")[0] for setting in more}
    quick = [setting for setting in QUICK if setting.partition("=")[0] not in said]
    record = spikellm.train(
        model, tokenizer, BUNDLED, text, steps=steps, settings=(*quick, *more), **keywords
    )
    return model, tokenizer, record


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.fixture(scope="module")
def coded_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Everything coded: layers with salient channels, rotated, and Q, K and V."""
    model, tokenizer = spikellm.load(BUNDLED)
    settings = ("attention.query.bits=4", "attention.key.bits=4", "attention.value.bits=4")
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=64, settings=settings
    )
    return spikellm.save(model, tokenizer, tmp_path_factory.mktemp("coded") / "coded")


def test_integers_stay_and_the_rest_moves(coded_folder: Path, text_file: Path) -> None:
    before, _ = spikellm.load(coded_folder)
    state = before.state_dict()
    model, _, record = trained(coded_folder, text_file, 3, "training.held_out=0")
    after = model.state_dict()
    assert len(record.losses) == 3
    for name, tensor in state.items():
        if tensor.dtype in FROZEN or (tensor.dim() > 1 and not name.endswith("weight_scale")):
            assert torch.equal(after[name], tensor), name
    added = after.keys() - state.keys()
    assert {name.rpartition(".")[2] for name in added} == {
        "group_share",
        "query_share",
        "key_share",
        "value_share",
    }
    for kind in ("weight_scale", "layernorm.weight"):
        names = [name for name in state if name.endswith(kind)]
        assert names
        assert all(not torch.equal(after[name], state[name]) for name in names)
    assert all(not one.requires_grad for one in model.buffers())


def test_a_trained_model_reloads(coded_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model, tokenizer, record = trained(
        coded_folder, text_file, 2, "training.held_out=0", "training.biases=true"
    )
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.record["training"] == record.model_dump(mode="json")
    assert again.config.quantization_config.parsed_recipe().training.biases
    assert "biases: true" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(RequestError, match="was trained already"):
        spikellm.train(again, tokenizer, BUNDLED, text_file)


def test_no_updates_change_no_byte(coded_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model, tokenizer, record = trained(coded_folder, text_file, 0)
    assert record is None
    spikellm.save(model, tokenizer, tmp_path / "coded")
    assert bytes_of(tmp_path / "coded") == bytes_of(coded_folder)


def test_what_lowers_no_loss_changes_nothing(coded_folder: Path, text_file: Path) -> None:
    model, _, record = trained(coded_folder, text_file, 1, "training.rate=1.0", "training.clip=1e6")
    before, _ = spikellm.load(coded_folder)
    assert record.best == 0
    assert any("nothing was changed" in note for note in record.notes)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(logits(model), logits(before))


def test_training_lowers_what_is_held_out(coded_folder: Path, text_file: Path) -> None:
    more = ("training.held_out=8", "training.batch=8", "training.check_every=4")
    _, _, record = trained(coded_folder, text_file, 12, *more)
    assert record.best > 0
    kept = next(one.loss for one in record.checks if one.update == record.best)
    assert kept < record.checks[0].loss


def test_a_recipe_converts_and_trains(text_file: Path, coded_folder: Path) -> None:
    model, tokenizer = spikellm.load(BUNDLED)
    settings = [
        *(f"attention.{part}.bits=4" for part in ("query", "key", "value")),
        "training=end-to-end",
        "training.steps=2",
        *QUICK,
    ]
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=64, settings=settings
    )
    apart, _, record = trained(coded_folder, text_file, 2)
    assert model.config.quantization_config.record["training"] == record.model_dump(mode="json")
    assert torch.equal(logits(model), logits(apart))


def test_a_coded_vocabulary_stays_as_it_is(text_file: Path) -> None:
    model, tokenizer = spikellm.load(BUNDLED)
    quick = ["vocabulary.bits=8", "training.steps=1", "training.held_out=0", *QUICK[:2]]
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    original, _ = spikellm.load(BUNDLED)
    original.model.layers = original.model.layers[:1]
    original.config.num_hidden_layers = 1
    spikellm.convert(
        model,
        tokenizer,
        "w4a4-t2",
        str(text_file),
        samples=2,
        seqlen=32,
        settings=quick,
        original=original,
    )
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding.multiplier, torch.ones_like(embedding.multiplier))
    assert model.config.quantization_config.record["training"]["best"] == 1


def test_another_original_is_refused(
    coded_folder: Path, text_file: Path, converted_folder: Path
) -> None:
    model, tokenizer = spikellm.load(coded_folder)
    before = logits(model)
    other, _ = spikellm.load(BUNDLED)
    other.model.norm.weight.data *= 1.5
    with pytest.raises(RequestError, match="other weights"):
        spikellm.train(model, tokenizer, other, text_file, steps=1, settings=QUICK)
    other.config.num_hidden_layers += 1
    with pytest.raises(RequestError, match="has num_hidden_layers"):
        spikellm.train(model, tokenizer, other, text_file, steps=1, settings=QUICK)
    with pytest.raises(RequestError, match="is a converted model"):
        spikellm.train(model, tokenizer, converted_folder, text_file, steps=1, settings=QUICK)
    assert torch.equal(logits(model), before)
    with pytest.raises(RequestError, match="was not converted"):
        spikellm.train(other, tokenizer, BUNDLED, text_file)


def test_a_short_text_is_refused(coded_folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words only, far from enough of them.", encoding="utf-8")
    with pytest.raises(RequestError, match="give a longer text"):
        trained(coded_folder, short)


def test_a_loss_that_is_never_finite_ends_in_an_error(
    coded_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: EndToEnd, logits: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return logits.sum() * torch.nan

    monkeypatch.setattr(EndToEnd, "loss", loss)
    model, tokenizer = spikellm.load(coded_folder)
    before = logits(model)
    with pytest.raises(NumericalError, match="the loss is NaN or infinite at update 1, also"):
        spikellm.train(model, tokenizer, BUNDLED, text_file, steps=1, settings=QUICK)
    assert torch.equal(logits(model), before)


def test_one_loss_that_is_not_finite_is_survived(
    coded_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = EndToEnd.loss, []

    def loss(self: EndToEnd, logits: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(logits.requires_grad)
        factor = torch.inf if sum(calls) == 2 else 1.0
        return own(self, logits, *rest, **options) * factor

    monkeypatch.setattr(EndToEnd, "loss", loss)
    _, _, record = trained(coded_folder, text_file, 3)
    assert len(record.losses) == 3
    assert any("went on from update 0 at 0.5 of the rate" in note for note in record.notes)
