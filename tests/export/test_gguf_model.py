from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import spikellm
from spikellm.core.errors import DependencyError, RequestError, UnsupportedModelError
from spikellm.export.gguf_model import write_gguf
from spikellm.export.gguf_types import TYPES, FileTypes, fitting_type, quantized

gguf = pytest.importorskip("gguf")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
Q4 = FileTypes("q4_0", "q8_0")


def small(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in found.fields.items()}
    return {tensor.name: tensor for tensor in found.tensors}, fields


def half_apart(heads: int, channels: int) -> list[int]:
    """Rows of the model library in llama.cpp's order, one by one."""
    return [
        head * channels + pair + half * channels // 2
        for head in range(heads)
        for pair in range(channels // 2)
        for half in range(2)
    ]


@pytest.mark.parametrize("types", [Q4, FileTypes("q4_1", "q4_1"), FileTypes("bf16", "f16")])
def test_tensors_are_those_of_the_model_as_the_package_quantizes_them(
    tmp_path: Path, types: FileTypes
) -> None:
    model = small(tie_word_embeddings=True)
    counts = write_gguf(model, tmp_path / "m.gguf", types)
    tensors, _ = read(tmp_path / "m.gguf")
    state = model.state_dict()
    expected = {
        "token_embd.weight": (state["model.embed_tokens.weight"], types.vocabulary),
        "output_norm.weight": (state["model.norm.weight"], "f32"),
    }
    for block in range(2):
        from_, to = f"model.layers.{block}", f"blk.{block}"
        for theirs, own, heads in (
            ("attn_q", "self_attn.q_proj", 4),
            ("attn_k", "self_attn.k_proj", 2),
            ("attn_v", "self_attn.v_proj", 0),
            ("attn_output", "self_attn.o_proj", 0),
            ("ffn_gate", "mlp.gate_proj", 0),
            ("ffn_up", "mlp.up_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
        ):
            weight = state[f"{from_}.{own}.weight"]
            weight = weight[half_apart(heads, 16)] if heads else weight
            expected[f"{to}.{theirs}.weight"] = (weight, types.layers)
        expected[f"{to}.attn_norm.weight"] = (state[f"{from_}.input_layernorm.weight"], "f32")
        after = state[f"{from_}.post_attention_layernorm.weight"]
        expected[f"{to}.ffn_norm.weight"] = (after, "f32")
    assert set(tensors) == set(expected)
    for name, (value, kind) in expected.items():
        found = tensors[name]
        assert found.tensor_type.name == kind.upper()
        assert list(found.shape) == list(value.shape[::-1])
        whole = gguf.quants.quantize(value.numpy(), found.tensor_type)
        assert np.array_equal(found.data.view(np.uint8), whole.view(np.uint8))
    assert sum(counts.values()) == 15
    assert counts[types.layers] == (15 if types.layers == types.vocabulary else 14)


def test_metadata(tmp_path: Path) -> None:
    write_gguf(small("mistral", sliding_window=32, head_dim=32), tmp_path / "m.gguf", Q4)
    tensors, fields = read(tmp_path / "m.gguf")
    assert "output.weight" in tensors, "not tied"
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 32, "as far as the window makes no difference"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.key_length"] == 32
    assert fields["llama.vocab_size"] == 50
    assert fields["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_families_keep_their_order(tmp_path: Path, kind: str) -> None:
    model = small(kind)
    write_gguf(model, tmp_path / "m.gguf", FileTypes("f16", "f16"))
    tensors, fields = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == kind
    weight = model.model.layers[1].self_attn.q_proj.weight.detach().half().numpy()
    assert np.array_equal(tensors["blk.1.attn_q.weight"].data, weight)
    assert ("blk.0.attn_q.bias" in tensors) == (kind == "qwen2")
    assert ("blk.0.attn_q_norm.weight" in tensors) == (kind == "qwen3")


def test_scaled_rotary_frequencies_become_factors(tmp_path: Path) -> None:
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = small(rope_parameters=scaled)
    write_gguf(model, tmp_path / "m.gguf", Q4)
    factors = read(tmp_path / "m.gguf")[0]["rope_freqs.weight"].data
    plain = 10000.0 ** -(np.arange(8) / 8)
    assert factors.max() > 1
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    with pytest.raises(UnsupportedModelError, match="llama.cpp reads none in this family"):
        write_gguf(small("qwen2", rope_parameters=scaled), tmp_path / "m.gguf", Q4)


def test_types_where_blocks_divide_no_row(tmp_path: Path) -> None:
    assert fitting_type("tq2_0", 512) == "tq2_0"
    assert fitting_type("tq2_0", 576) == "q4_0"
    assert {fitting_type(name, 40) for name in TYPES} == {"f16", "bf16"}
    counts = write_gguf(small(), tmp_path / "m.gguf", FileTypes("tq2_0", "q8_0"))
    assert counts == {"q8_0": 2, "q4_0": 12, "tq2_0": 2}


@pytest.mark.parametrize("name", TYPES)
def test_parts_of_rows_give_the_blocks_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("spikellm.export.gguf_types._ROWS", 3)
    values = torch.randn(7, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(quantized(values, name), whole)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt2", {}, "not mapped one to one"),
        ("mixtral", {"num_local_experts": 2}, "not mapped one to one"),
        ("llama", {"hidden_act": "gelu"}, "with gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of type dynamic",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "of type yarn",
        ),
    ],
)
def test_refused_models(tmp_path: Path, kind: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        write_gguf(small(kind, **changes), tmp_path / "m.gguf", Q4)
    assert not any(tmp_path.iterdir())


def test_refused_requests(
    tmp_path: Path, converted_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="converted model"):
        write_gguf(spikellm.load(converted_folder)[0], tmp_path / "m.gguf", Q4)
    with pytest.raises(RequestError, match="unknown GGUF type 'q9'"):
        write_gguf(small(), tmp_path / "m.gguf", FileTypes("q9", "q8_0"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match=r"pip install 'spikellm\[gguf\]'"):
        write_gguf(small(), tmp_path / "m.gguf", Q4)
