"""Converted models as GGUF files, read back by the ``gguf`` package and the model library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import spikellm
from conftest import BUNDLED, first_blocks
from spikellm.__main__ import main
from spikellm.core.errors import DependencyError, UnsupportedModelError
from spikellm.export.gguf_model import adjacent_pairs
from spikellm.nn.execution import spiking_linears

gguf = pytest.importorskip("gguf")

REAL = os.environ.get("SPIKELLM_LLAMA_BENCH") or shutil.which("llama-bench")
ALONE = ("activations.bits=16",)
EXACT = (*ALONE, "weights.scale_bits=16")
SYMMETRIC = (*EXACT, "weights.symmetric=true")
TERNARY = ("algorithm.rounds=1", "weights.scale_bits=16")
CODED = "attention={query: {bits: 8}, key: {bits: 8}, value: {bits: 8}}"


def converted(
    text: Path, folder: Path, *settings: str, recipe: str = "rtn-w4a4", model: Any = None
) -> Any:
    own, tokenizer = first_blocks(2)
    model = own if model is None else model
    spikellm.convert(model, tokenizer, recipe, str(text), samples=2, seqlen=32, settings=settings)
    spikellm.save(model, tokenizer, folder)
    return model


def family(kind: str, **changes: Any) -> Any:
    """A small random model of a family that fits the bundled tokenizer."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 2048,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **changes,
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    return model


def export(folder: Path, *more: str) -> int:
    given = ["export", str(folder / "in"), str(folder / "out"), "--format", "gguf"]
    return main([*given, *more])


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "export.json").read_text("utf-8"))
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.detach().float(), other.detach().float()
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize(
    ("settings", "recipe", "types"),
    [
        ((*SYMMETRIC, "weights.group_size=32"), "rtn-w4a4", {"q4_0": 14}),
        (SYMMETRIC, "rtn-w4a4", {"q4_0": 14}),
        (EXACT, "rtn-w4a4", {"q5_0": 14}),
        ((*SYMMETRIC, "weights.bits=8"), "rtn-w4a4", {"q8_0": 14}),
        (
            (*TERNARY, "weights.group_size=256"),
            "ternary-1.0",
            {"q4_0": 12, "tq2_0": 2},
        ),
        (
            (*SYMMETRIC, "lm_head=true", 'overrides=[{match: "*.v_proj", skip: true}]'),
            "rtn-w4a4",
            {"q4_0": 13},
        ),
    ],
)
def test_reader_gives_the_same_weights(
    settings: tuple[str, ...], recipe: str, types: dict[str, int], text_file: Path, tmp_path: Path
) -> None:
    untied = family("llama", tie_word_embeddings=False) if "lm_head=true" in settings else None
    model = converted(text_file, tmp_path / "in", *settings, recipe=recipe, model=untied)
    assert export(tmp_path) == 0
    (file,) = record(tmp_path)["files"]
    assert file["types"] == types
    assert file["tokenizer"]
    assert file["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    found, tokenizer = spikellm.load(tmp_path / "out" / "model.gguf", dtype="float32")
    layers = spiking_linears(model)
    for name, weight in found.state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        own = model.state_dict()[name] if layer is None else layer.dense_weight()
        assert same_bits(weight, own), name
    text = "def f(x):\n    return 12345 * x  # é</s>"
    assert tokenizer(text).input_ids == spikellm.load(BUNDLED)[1](text).input_ids


def test_logits_are_those_of_the_converted_model(
    text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    converted(text_file, tmp_path / "in", *SYMMETRIC)
    assert export(tmp_path) == 0
    model, _ = spikellm.load(tmp_path / "in", dtype="float32")
    found, _ = spikellm.load(tmp_path / "out" / "model.gguf", dtype="float32")
    with torch.no_grad():
        logits, expected = found(tokens).logits, model(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_families(kind: str, text_file: Path, tmp_path: Path) -> None:
    model = converted(text_file, tmp_path / "in", *SYMMETRIC, model=family(kind))
    assert export(tmp_path) == 0
    file = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {one.name: one for one in file.tensors}
    for block in range(2):
        for theirs, own in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
            layer = spiking_linears(model)[f"model.layers.{block}.{own}"]
            found = tensors[f"blk.{block}.{theirs}.weight"]
            read = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
            turned = kind == "mistral" and theirs == "attn_q"
            dense = layer.dense_weight()
            assert same_bits(read, adjacent_pairs(dense, 4) if turned else dense)
            bias = tensors.get(f"blk.{block}.{theirs}.bias")
            assert (bias is None) == (layer.bias is None)
            if bias is not None:
                assert same_bits(torch.from_numpy(bias.data.copy()), layer.bias)


def test_scaled_rotary_frequencies_are_in_the_file(text_file: Path, tmp_path: Path) -> None:
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = family("llama", rope_parameters=scaled)
    converted(text_file, tmp_path / "in", *SYMMETRIC, model=model)
    assert export(tmp_path) == 0
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert tensors["rope_freqs.weight"].data.max() > 1
    with pytest.raises(UnsupportedModelError, match="scales rotary frequencies"):
        spikellm.load(tmp_path / "out" / "model.gguf")  # the library would leave them out


def test_fused_transforms_are_in_the_weights(
    text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    fused = "transforms=[norm-equalization, residual-rotation, value-output-rotation]"
    converted(text_file, tmp_path / "in", *SYMMETRIC, fused)
    assert export(tmp_path) == 0
    model, _ = spikellm.load(tmp_path / "in", dtype="float32")
    found, _ = spikellm.load(tmp_path / "out" / "model.gguf", dtype="float32")
    with torch.no_grad():
        logits, expected = found(tokens).logits, model(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_tokenizer_that_has_no_words_is_told(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(text_file, tmp_path / "in", *SYMMETRIC)
    path = tmp_path / "in" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "normalizer": {"type": "Lowercase"}}), encoding="utf-8")
    assert export(tmp_path) == 0
    assert "the tokenizer, for it changes text" in capsys.readouterr().out
    assert not record(tmp_path)["files"][0]["tokenizer"]


@pytest.mark.parametrize(
    ("settings", "recipe", "why"),
    [
        (("weights.scale_bits=16",), "rtn-w4a4", "inputs are spikes"),
        (ALONE, "rtn-w4a4", "more bits than float16"),
        ((*EXACT, "weights.group_size=48"), "rtn-w4a4", "within one of GGUF's blocks of 32"),
        ((*EXACT, "weights.bits=8"), "rtn-w4a4", "convert with --set weights.symmetric=true"),
        ((*SYMMETRIC, "vocabulary.bits=8"), "rtn-w4a4", "no words for"),
        ((*SYMMETRIC, CODED), "rtn-w4a4", "codes Q, K and V as spikes"),
        ((*SYMMETRIC, "transforms=[online-rotation]"), "rtn-w4a4", "has a Rotat"),
        ((*SYMMETRIC, "transforms=[value-centering]"), "rtn-w4a4", "a bias that its family lacks"),
        (TERNARY, "ternary-1.4", "different numbers of steps"),
        ((), "pbllm-80", "weights are partly-binary"),
    ],
)
def test_what_it_cannot_say_is_refused(
    settings: tuple[str, ...],
    recipe: str,
    why: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    converted(text_file, tmp_path / "in", *settings, recipe=recipe)
    assert export(tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert why in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("phi", {}, "not mapped one to one"),
        ("llama", {"hidden_act": "gelu"}, "with gelu"),
        ("llama", {"attention_bias": True}, "asks for biases"),
    ],
)
def test_models_that_readers_would_run_otherwise_are_refused(
    kind: str,
    changes: dict[str, Any],
    why: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    converted(text_file, tmp_path / "in", *SYMMETRIC, model=family(kind, **changes))
    assert export(tmp_path) == 2
    assert why in capsys.readouterr().err


def test_wrong_requests(
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["export", str(BUNDLED), str(tmp_path / "out"), "--format", "gguf"]
    assert main(given) == 2
    assert "is not converted" in capsys.readouterr().err
    converted(text_file, tmp_path / "in", *SYMMETRIC)
    assert export(tmp_path, "--layer", "model.layers.0.mlp.down_proj") == 2
    assert "leave --layer out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "gguf", None)
    from spikellm.export import exporters

    with pytest.raises(DependencyError, match=r"spikellm\[gguf\]"):
        exporters["gguf"]()


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="no llama-bench on the path or in SPIKELLM_LLAMA_BENCH")
@pytest.mark.parametrize(
    ("settings", "recipe"),
    [
        ((*SYMMETRIC, "weights.group_size=32"), "rtn-w4a4"),
        (EXACT, "rtn-w4a4"),
        ((*SYMMETRIC, "weights.bits=8"), "rtn-w4a4"),
        (TERNARY, "ternary-1.0"),
    ],
)
def test_real_program(
    settings: tuple[str, ...], recipe: str, text_file: Path, tmp_path: Path
) -> None:
    converted(text_file, tmp_path / "in", *settings, recipe=recipe)
    assert export(tmp_path) == 0
    file = tmp_path / "out" / "model.gguf"
    asked = [str(REAL), "-m", str(file), "-p", "8", "-n", "4", "-r", "1", "-t", "1", "-o", "json"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=600).stdout
    assert all(one["avg_ts"] > 0 for one in json.loads(told))
