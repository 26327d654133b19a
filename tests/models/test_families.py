"""Every family: blocks found, converted, the three forms equal, causal, saved and reloaded bit for
bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import spikellm
from families import FAMILIES, GATED, build, by_family
from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.models.families import find_blocks, has_tied_head, longest_window
from spikellm.nn.execution import spiking_linears

SETTINGS = ["activations.bits=3", "activations.salient_rate=0.2"]


def convert(model: Any, tokenizer: Any, text_file: Path) -> spikellm.Conversion:
    return spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=3, seqlen=32, settings=SETTINGS
    )


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_convert_save_reload(
    family: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = build(family)
    original = model(tokens).logits
    dense = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    convert(model, tokenizer, text_file)
    head = {
        name for name, module in model.named_modules() if module is model.get_output_embeddings()
    }
    assert set(spiking_linears(model)) == dense - head, (
        "every linear layer of every block, and nothing else"
    )
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.isfinite(logits).all()
        assert 0 < float((logits - original).norm() / original.norm()) < 1.5
        for form in ("stepped", "binary"):
            spikellm.set_execution_mode(model, form)  # type: ignore[arg-type]
            assert torch.equal(model(tokens).logits, logits)
        spikellm.set_execution_mode(model, "merged")
        changed = tokens.clone()
        changed[:, -1] += 1
        assert torch.equal(model(changed).logits[:, :-1], logits[:, :-1]), (
            "what comes later changes nothing before"
        )
        spikellm.save(model, tokenizer, tmp_path / "out")
        again, _ = spikellm.load(tmp_path / "out")
        assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_originals_hold_what_they_declare(
    family: str, tokenizer: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(spikellm.load(tmp_path)[0](tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_many_bits_are_close_to_the_original(
    family: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor
) -> None:
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
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(config))


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of equal decoder blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_window_and_tied_head() -> None:
    assert longest_window(FAMILIES["gpt2"]()) == 64
    assert longest_window(FAMILIES["bloom"]()) is None
    assert not has_tied_head(build("llama"))
    tied = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**GATED, "tie_word_embeddings": True}, head_dim=10)
    )
    assert has_tied_head(tied)


def test_output_projection_on_request(
    tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = build("llama")
    result = spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, settings=["lm_head=true"]
    )
    assert "lm_head" in spiking_linears(model)
    assert result.blocks[-1].name == "lm_head"
    spikellm.save(model, tokenizer, tmp_path / "out")
    assert torch.equal(spikellm.load(tmp_path / "out")[0](tokens).logits, model(tokens).logits)


def converted_with_head(
    recipe: str, tokenizer: Any, text_file: Path
) -> tuple[Any, spikellm.Conversion, list[torch.Tensor]]:
    """Also the inputs of the output projection, as the converted blocks give them."""
    model, inputs = build("llama"), []
    model.lm_head.register_forward_pre_hook(
        lambda module, arguments: inputs.append(arguments[0].reshape(-1, 40))
    )
    result = spikellm.convert(
        model, tokenizer, recipe, str(text_file), samples=16, seqlen=32, settings=["lm_head=true"]
    )
    return model, result, inputs


@pytest.mark.parametrize("recipe", ["gptq-w2a16", "ternary-1.4", "pbllm-90"])
def test_output_projection_is_fitted_as_the_blocks_are(
    recipe: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model, result, _ = converted_with_head(recipe, tokenizer, text_file)
    assert type(model.lm_head) is type(model.model.layers[0].mlp.up_proj)
    assert (result.blocks[-1].name, result.blocks[-1].layers) == ("lm_head", ["lm_head"])
    assert bool(result.blocks[-1].notes) == (recipe == "ternary-1.4"), (
        "a budget over all layers is one over those of the blocks"
    )
    spikellm.save(model, tokenizer, tmp_path / "out")
    assert torch.equal(spikellm.load(tmp_path / "out")[0](tokens).logits, model(tokens).logits)


def test_error_feedback_reaches_the_output_projection(tokenizer: Any, text_file: Path) -> None:
    dense = build("llama").lm_head.weight.detach()
    model, _, inputs = converted_with_head("gptq-w2a16", tokenizer, text_file)
    rounded, _, _ = converted_with_head("rtn-w2a16", tokenizer, text_file)
    fitted, plain = (
        float((inputs[-1] @ (one.lm_head.dense_weight() - dense).T).square().mean())
        for one in (model, rounded)
    )
    assert fitted < 0.9 * plain


def test_output_projection_of_an_algorithm_that_learns_is_rounded_and_said(
    tokenizer: Any, text_file: Path
) -> None:
    seen: list[Any] = []
    settings, given = (
        ["lm_head=true", "algorithm.epochs=1"],
        {
            "samples": 2,
            "seqlen": 32,
            "on_block": seen.append,
        },
    )
    result = spikellm.convert(
        build("llama"), tokenizer, "omniquant-w2a16", str(text_file), settings=settings, **given
    )
    [note] = result.blocks[-1].notes
    assert (
        note
        == "lm_head is rounded to nearest: algorithm 'omniquant' learns on what a block gives, and"
        " there is none around it"
    )
    assert [(one.record.name, one.index, one.total) for one in seen] == [
        ("model.layers.0", 0, 3),
        ("model.layers.1", 1, 3),
        ("lm_head", 2, 3),
    ]


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        (
            "rtn-w4a4",
            "weights: {format: ternary}",
            "'rtn' fits weight codes of kind affine, and lm_head asks for format 'ternary',"
            " which has kind 'ternary'; set algorithm to block-ap or gptq, or",
        ),
        (
            "omniquant-w2a16",
            "weights: {format: partly-binary, salient_rate: 0.1}",
            "'omniquant', which rounds it to nearest, fits weight codes of kind affine, and lm_head"
            " asks for format 'partly-binary'",
        ),
        ("gptq-w4a16", "skip: true", "no output projection or an override skips it"),
    ],
)
def test_what_the_output_projection_cannot_become_is_said_before_any_work(
    recipe: str, override: str, message: str, tokenizer: Any, text_file: Path
) -> None:
    seen: list[Any] = []
    settings, model = (
        ["lm_head=true", f"overrides=[{{match: lm_head, {override}}}]"],
        build("llama"),
    )
    with pytest.raises(RequestError, match=message):
        spikellm.convert(
            model,
            tokenizer,
            recipe,
            str(text_file),
            samples=1,
            seqlen=16,
            settings=settings,
            on_block=seen.append,
        )
    assert not seen


def test_tied_output_projection_is_refused(bundled: tuple[Any, Any], text_file: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="shares its weight"):
        spikellm.convert(
            *bundled, "w8a8", str(text_file), samples=1, seqlen=32, settings=["lm_head=true"]
        )
