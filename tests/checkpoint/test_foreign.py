"""Models whose weights another program quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import spikellm
from spikellm.checkpoint.load import require_model
from spikellm.core.errors import (
    CheckpointError,
    DependencyError,
    RequestError,
    UnsupportedModelError,
)
from spikellm.export import gguf_model as own
from spikellm.export.gguf_model import adjacent_pairs
from spikellm.export.gguf_types import FileTypes

_PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def tiny_folder() -> Path:
    """The bundled model."""
    return Path(spikellm.__file__).parent / "assets" / "stdlib-2m"


def write_gguf(folder: Path, path: Path, type_name: str) -> LlamaForCausalLM:
    """A Llama model and its tokenizer of byte pairs as llama.cpp's own converter writes them."""
    model, tokenizer = spikellm.load(folder, dtype="float32")
    config, merges = model.config, json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType[type_name]
    writer.add_file_type(0 if type_name == "F32" else int(gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_token_list(names)
    writer.add_token_types([1] * len(names))
    pairs = [one if isinstance(one, str) else " ".join(one) for one in merges["merges"]]
    writer.add_token_merges(pairs)

    def add(name: str, tensor: torch.Tensor) -> None:
        own = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), own), raw_dtype=own)

    add("token_embd.weight", model.model.embed_tokens.weight.detach())
    add("output_norm.weight", model.model.norm.weight.detach())
    if not config.tie_word_embeddings:
        add("output.weight", model.lm_head.weight.detach())
    for number, block in enumerate(model.model.layers):
        for place, name in _PLACES.items():
            weight = block.get_submodule(place).weight.detach()
            heads = {
                "attn_q": config.num_attention_heads,
                "attn_k": config.num_key_value_heads,
            }.get(name)
            kept = weight if heads is None else adjacent_pairs(weight, heads)
            add(f"blk.{number}.{name}.weight", kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_gguf_file_is_read(
    type_name: str, tiny_folder: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    original = write_gguf(tiny_folder, tmp_path / "model.gguf", type_name)
    require_model(str(tmp_path / "model.gguf"))
    found, tokenizer = spikellm.load(tmp_path / "model.gguf")
    exact = type_name == "F32"
    assert found.dtype == (torch.float32 if exact else torch.bfloat16)
    assert not getattr(found, "is_quantized", False)
    with torch.no_grad():
        logits, expected = found(tokens).logits.float(), original(tokens).logits
    torch.testing.assert_close(
        logits, expected, rtol=0, atol=1e-5 if exact else 0.05 * float(expected.abs().max())
    )
    known = spikellm.load(tiny_folder)[1]
    assert tokenizer("def f(x):").input_ids == known("def f(x):").input_ids


def test_gguf_file_is_converted(
    tiny_folder: Path, text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    write_gguf(tiny_folder, tmp_path / "model.gguf", "Q8_0")
    model, tokenizer = spikellm.load(tmp_path / "model.gguf")
    spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=16)
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_damaged_gguf_file_is_refused(damage: str, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if damage == "cut":
        write_gguf(tiny_folder, path, "F32")
        path.write_bytes(path.read_bytes()[:-5000])
    else:
        path.write_text("no model")
    for look in (spikellm.load, lambda where: require_model(str(where))):
        with pytest.raises(CheckpointError, match="cannot be read as a GGUF file") as caught:
            look(path)
        assert "\n" not in str(caught.value)


def quantized_folder(tiny_folder: Path, folder: Path, method: str) -> dict[str, Any]:
    """A folder that says how its weights are quantized, by scales of blocks of 128 × 128."""
    model, tokenizer = spikellm.load(tiny_folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors, kept = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if "proj" in name:
            scale = tensor.float().abs().max() / 448
            kept[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in tensor.shape]
            kept[f"{name}_scale_inv"] = torch.full(blocks, float(scale))
        else:
            kept[name] = tensor
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_quantized_weights_become_floating_point(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    tensors = quantized_folder(tiny_folder, tmp_path, "fp8")
    model, tokenizer = spikellm.load(tmp_path)
    for name, weight in model.named_parameters():
        if "proj" in name:
            limit = 2.0**-4 * tensors[name].float().abs() + 2.0**-6 * float(
                tensors[name].abs().max()
            )
            assert ((weight.float() - tensors[name].float()).abs() <= limit).all(), name
    assert not hasattr(model.config, "quantization_config")
    spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=16)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "compressed-tensors"])
def test_scales_that_the_library_does_not_take_are_no_small_matter(
    method: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """As AutoFP8 names them; without scales weights would be a thousand times too large."""
    quantized_folder(tiny_folder, tmp_path, method)
    file = tmp_path / "model.safetensors"
    tensors = {
        name.replace("_scale_inv", "_scale" if method == "fp8" else "_scale_inv"): one
        for name, one in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        spikellm.load(tmp_path)


@pytest.mark.parametrize("given", [[], "fp8", {"quant_method": ["fp8"]}, {}])
def test_settings_that_say_nothing_are_refused(
    given: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    quantized_folder(tiny_folder, tmp_path, "fp8")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = given
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((UnsupportedModelError, CheckpointError)) as caught:
        spikellm.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_lies_beside_a_gguf_file_is_not_looked_at(tiny_folder: Path, tmp_path: Path) -> None:
    write_gguf(tiny_folder, tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    model, tokenizer = spikellm.load(tmp_path / "model.gguf")
    assert "Bert" not in type(tokenizer).__name__
    assert model.name_or_path == str(tmp_path / "model.gguf")


def test_gguf_file_without_a_tokenizer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    model, _ = spikellm.load(tiny_folder)
    own.write_gguf(model, tmp_path / "model.gguf", FileTypes("q8_0", "q8_0"))
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        spikellm.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["a" * 300, "nothere.gguf", "some/nothere.gguf"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises((RequestError, DependencyError)):
        require_model(name)
    with pytest.raises((RequestError, DependencyError)):
        spikellm.load(name)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_weights_that_stay_quantized_are_refused_by_name(
    method: str, tiny_folder: Path, tmp_path: Path
) -> None:
    quantized_folder(tiny_folder, tmp_path, method)
    with pytest.raises(UnsupportedModelError, match=f"quantized by {method}"):
        spikellm.load(tmp_path)
