"""Every family: blocks found, converted, the three forms equal, causal, saved and reloaded bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import spikellm
from families import FAMILIES, GATED, build
from spikellm.errors import UnsupportedModelError
from spikellm.modeling.families import find_blocks, has_tied_head, longest_window
from spikellm.modeling.forms import spiking_linears

SETTINGS = ["activations.bits=3", "activations.salient_rate=0.2"]


def convert(model: Any, tokenizer: Any, text_file: Path) -> spikellm.Conversion:
    return spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=3, seqlen=32, settings=SETTINGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_save_reload(family: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = build(family)
    original = model(tokens).logits
    dense = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    convert(model, tokenizer, text_file)
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    assert set(spiking_linears(model)) == dense - head, "every linear layer of every block, and nothing else"
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.isfinite(logits).all()
        assert 0 < float((logits - original).norm() / original.norm()) < 1.5
        for form in ("stepped", "binary"):
            spikellm.set_form(model, form)  # type: ignore[arg-type]
            assert torch.equal(model(tokens).logits, logits)
        spikellm.set_form(model, "merged")
        changed = tokens.clone()
        changed[:, -1] += 1
        assert torch.equal(model(changed).logits[:, :-1], logits[:, :-1]), "what comes later changes nothing before"
        spikellm.save(model, tokenizer, tmp_path / "out")
        again, _ = spikellm.load(tmp_path / "out")
        assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_many_bits_are_close_to_the_original(family: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor) -> None:
    model = build(family)
    with torch.no_grad():
        original = model(tokens).logits
        spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=2, seqlen=32)
        assert float((model(tokens).logits - original).norm() / original.norm()) < 0.05


def test_conv1d_is_transposed(tokenizer: Any, text_file: Path) -> None:
    model = build("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    spikellm.convert(model, tokenizer, "w8a8", str(text_file), samples=1, seqlen=32)
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == tuple(weight.shape)
    torch.testing.assert_close(layer.dense_weight(), weight.T, rtol=0, atol=0.02)


def test_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(config))


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of equal decoder blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_window_and_tied_head() -> None:
    assert longest_window(FAMILIES["gpt2"]()) == 64
    assert longest_window(FAMILIES["bloom"]()) is None
    assert not has_tied_head(build("llama"))
    tied = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**GATED, "tie_word_embeddings": True}, head_dim=10))
    assert has_tied_head(tied)


def test_output_projection_on_request(tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = build("llama")
    result = spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, settings=["lm_head=true"])
    assert "lm_head" in spiking_linears(model)
    assert result.blocks[-1].name == "lm_head"
    spikellm.save(model, tokenizer, tmp_path / "out")
    assert torch.equal(spikellm.load(tmp_path / "out")[0](tokens).logits, model(tokens).logits)


def test_tied_output_projection_is_refused(bundled: tuple[Any, Any], text_file: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="shares its weight"):
        spikellm.convert(*bundled, "w8a8", str(text_file), samples=1, seqlen=32, settings=["lm_head=true"])
