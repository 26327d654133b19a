from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spikellm
from conftest import first_blocks
from families import FAMILIES, build, by_family
from spikellm.checkpoint.vocabulary import shown_vocabulary
from spikellm.commands.inspect import vocabulary_in_words
from spikellm.core.errors import CheckpointError, RecipeError, RequestError, UnsupportedModelError
from spikellm.models.families import has_tied_head
from spikellm.models.kernel_summary import summarize_kernels
from spikellm.models.vocabulary import plan_vocabulary
from spikellm.nn.vocabulary import CodedEmbedding, CodedHead
from spikellm.profiling.operations import OperationCounter
from spikellm.recipe import Recipe, VocabularyRecipe
from spikellm.recipe.load import load_recipe

CODED = {"algorithm": "rtn", "weights": {"bits": 8}, "activations": {"bits": 8}}


def recipe(**vocabulary: Any) -> Recipe:
    return Recipe.model_validate({**CODED, "vocabulary": vocabulary})


def convert(model: Any, tokenizer: Any, text: Path, wanted: Recipe) -> Any:
    return spikellm.convert(model, tokenizer, wanted, str(text), samples=2, seqlen=16)


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_every_family_saves_and_reloads(
    family: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = build(family)
    embedding = model.get_input_embeddings()
    exact = embedding(tokens).detach().float()
    tied = has_tied_head(model)
    convert(model, tokenizer, text_file, recipe(bits=8))
    coded, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(coded, CodedEmbedding)
    assert isinstance(head, CodedHead)
    assert head.shared == tied
    torch.testing.assert_close(
        coded(tokens).float(), exact, rtol=0, atol=float(exact.abs().max()) / 100
    )
    with torch.no_grad():
        expected = model(tokens).logits
    folder = spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(folder)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    assert torch.equal(again.get_input_embeddings().multiplier, coded.multiplier)


def test_a_tied_table_is_stored_once(
    bundled: tuple[Any, Any], text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model, tokenizer = bundled
    vocabulary, channels = model.get_input_embeddings().weight.shape
    found = convert(model, tokenizer, text_file, recipe(bits=6))
    record = found.blocks[-1]
    assert record.layers == ["model.embed_tokens", "lm_head"]
    assert 0 < record.relative_loss < 0.002
    folder = spikellm.save(model, tokenizer, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.table.weight_codes"].shape == (vocabulary, channels * 6 // 8)
    assert [name for name in tensors if name.startswith("lm_head")] == []
    again, _ = spikellm.load(folder)
    assert again.get_output_embeddings().table is again.get_input_embeddings().table
    again.tie_weights()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    twice = spikellm.save(again, tokenizer, tmp_path / "twice")
    assert (twice / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    [head] = [layer for layer in found.summary.layers if layer.name == "lm_head"]
    assert (head.weight_bits, head.spiking) == (6, False)
    assert head.weight_bytes == vocabulary * (channels * 6 // 8 + 4)
    with pytest.raises(TypeError, match="CodedEmbedding"):
        again.resize_token_embeddings(10)


def test_it_is_counted_and_shown_with_its_bits(text_file: Path, tokens: torch.Tensor) -> None:
    model, tokenizer = first_blocks(1)
    with torch.no_grad(), OperationCounter(model) as counter:
        model(tokens)
    before = counter.take()
    convert(model, tokenizer, text_file, recipe(bits=8))
    with torch.no_grad(), OperationCounter(model) as counter:
        model(tokens)
    after = counter.take()
    assert after.kinds["lm_head"] == before.kinds["lm_head"] == "head"
    assert after.tokens == before.tokens
    [(bits, macs)] = after.layers["lm_head"].by_bits.items()
    assert bits == (16, 8)
    assert macs == before.layers["lm_head"].macs
    words = vocabulary_in_words(shown_vocabulary(model) or {})
    assert words == (
        "vocabulary: model.embed_tokens and lm_head have one table of 8-bit rows, 392.0 KiB"
    )
    found = sum(one.modules for one in summarize_kernels(model))
    assert found == 7 + 2
    spikellm.set_execution_mode(model, "binary")


def test_either_alone_where_there_are_two_tables(
    tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    for layer, kinds in (
        ("embedding", (CodedEmbedding, nn.Linear)),
        ("head", (nn.Embedding, CodedHead)),
    ):
        model = build("llama")
        convert(model, tokenizer, text_file, recipe(bits=8, layers=[layer], group_size=16))
        folder = spikellm.save(model, tokenizer, tmp_path / layer)
        again, _ = spikellm.load(folder)
        found = again.get_input_embeddings(), again.get_output_embeddings()
        assert all(isinstance(one, kind) for one, kind in zip(found, kinds, strict=True))
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_what_cannot_be_is_refused_before_any_work(
    bundled: tuple[Any, Any], text_file: Path
) -> None:
    model, tokenizer = bundled
    with pytest.raises(RequestError, match="one table for embedding and head"):
        convert(model, tokenizer, text_file, recipe(layers=["head"]))
    with pytest.raises(RecipeError, match=r"lm_head is true.*vocabulary\.layers"):
        load_recipe("rtn-w4a4", ["lm_head=true", "vocabulary.bits=8"])
    with pytest.raises(RecipeError, match=r"vocabulary\.bits"):
        load_recipe("rtn-w4a4", ["vocabulary.bits=3"])
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(UnsupportedModelError, match="gives something else than its rows"):
        plan_vocabulary(model, VocabularyRecipe())
    with pytest.raises(UnsupportedModelError):
        convert(model, tokenizer, text_file, recipe())
    assert type(model.get_input_embeddings()) is nn.Embedding
    adapting = recipe().model_copy(update={"adapt": True})
    convert(model, tokenizer, text_file, adapting)
    [note] = model.config.quantization_config.record["notes"]
    assert note.startswith("embedding and output projection stay as they are")


def test_recipes_without_it_are_saved_as_before() -> None:
    assert "vocabulary" not in load_recipe("rtn-w4a4").model_dump()
    saved = recipe(bits=8).model_dump(mode="json")
    assert Recipe.model_validate(saved) == recipe(bits=8)
    assert load_recipe("rtn-w4a4", ["vocabulary.bits=6"]).vocabulary == VocabularyRecipe(bits=6)


def test_damage_is_named(bundled: tuple[Any, Any], text_file: Path, tmp_path: Path) -> None:
    model, tokenizer = bundled
    convert(model, tokenizer, text_file, recipe(bits=8))
    folder = spikellm.save(model, tokenizer, tmp_path / "out")
    whole = load_file(folder / "model.safetensors")
    scale, codes = (f"model.embed_tokens.table.weight_{one}" for one in ("scale", "codes"))

    def refused(tensors: dict[str, torch.Tensor], why: str) -> None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=why):
            spikellm.load(folder)

    refused({**whole, scale: whole[scale] * float("nan")}, "not finite and positive")
    refused({**whole, scale: whole[scale].half()}, "stored as F16, expected F32")
    refused({key: one for key, one in whole.items() if key != codes}, "weight_codes")
    refused({**whole, codes: whole[codes][:, 1:].contiguous()}, "do not fit its configuration")
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for wrong in (
        {"embedding": "model.norm", "head": "lm_head", "shared": True},
        {"embedding": None, "head": "lm_head", "shared": True},
        {"embedding": "model.embed_tokens", "head": 3, "shared": True},
    ):
        config["quantization_config"]["vocabulary"] = wrong
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="damaged"):
            spikellm.load(folder)
