"""Stored bits, compared with what lies in files and with counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as t
from safetensors.torch import load_file
from torch import nn

import spikellm
from conftest import PROJECT, first_blocks
from families import GATED, build, randomized
from spikellm.checkpoint.save import spike_config
from spikellm.models.experts import unfuse_experts
from spikellm.models.stored_bits import KINDS, StoredBits, stored_bits, table_rows
from spikellm.nn.buffer_kinds import WEIGHT_KINDS
from spikellm.nn.execution import spiking_linears


def bits_in(folder: Path) -> int:
    """Bits of all tensors in the files of a saved model."""
    tensors = [one for path in folder.glob("*.safetensors") for one in load_file(path).values()]
    return sum(8 * one.numel() * one.element_size() for one in tensors)


def convert(text: Path, recipe: str, *settings: str) -> tuple[Any, Any]:
    model, tokenizer = first_blocks(1)
    spikellm.convert(
        model, tokenizer, recipe, str(text), samples=2, seqlen=64, settings=list(settings)
    )
    return model, tokenizer


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("ternary-1.0", ()),
        ("pbllm-95", ()),
        ("w4a4-t2", ("vocabulary={bits: 8}",)),
        ("rtn-w4a4", ("weights.salient_rate=0.1", "weights.salient_steps=2")),
        ("rtn-w4a4", ("transforms=[{name: residual-rotation}, {name: online-rotation}]",)),
    ],
)
def test_all_bits_of_the_files_are_counted(
    recipe: str, settings: tuple[str, ...], text_file: Path, tmp_path: Path
) -> None:
    parameters = sum(one.numel() for one in first_blocks(1)[0].parameters())
    model, tokenizer = convert(text_file, recipe, *settings)
    found = stored_bits(model)
    folder = spikellm.save(model, tokenizer, tmp_path / "out")
    assert found.total == bits_in(folder)
    assert found.parameters == parameters, "also where a table was parted or biases were added"
    again, _ = spikellm.load(folder)
    assert stored_bits(again) == found
    summary = spikellm.summarize(again)
    assert summary.stored == found
    assert summary.total_bytes * 8 == found.total
    for kind in WEIGHT_KINDS:
        assert sum(layer.stored.get(kind, 0) for layer in summary.layers) == found.bits[kind]


def test_kinds_are_those_of_the_formats(text_file: Path) -> None:
    """A plane of +1 and one of −1 for each ternary weight, a mask of one bit for each partly
    binary one; columns are whole bytes here.
    """
    model, _ = convert(text_file, "ternary-1.0")
    layers, found = spiking_linears(model).values(), stored_bits(model)
    assert found.weights == sum(layer.in_features * layer.out_features for layer in layers)
    assert found.share("codes") == 2
    assert found.bits["masks"] == 0
    assert found.bits["scales"] == sum(32 * layer.weight_scale.numel() for layer in layers)
    assert found.bits["indices"] == sum(2 * 8 * layer.in_features for layer in layers)
    assert found.bits_a_weight == pytest.approx(2 + found.share("scales") + found.share("indices"))
    partly, _ = convert(text_file, "pbllm-95")
    found = stored_bits(partly)
    assert found.share("masks") == 1
    assert found.share("codes") == pytest.approx(1 + 8 * 0.05, abs=0.01)


def test_an_original_takes_its_own_bits() -> None:
    model, _ = first_blocks(1)
    found = stored_bits(model)
    assert found.bits_a_weight == found.bits_a_parameter == 16
    assert found.bits["vocabulary"] == 16 * model.get_input_embeddings().weight.numel()
    assert sum(found.bits[kind] for kind in WEIGHT_KINDS) == 0
    assert stored_bits(model.float()).bits_a_weight == 32
    assert stored_bits(model.to("meta")).bits_a_weight == 32
    assert stored_bits(build("gpt2")).bits["unconverted"] > 0, "transposed layers too"


def test_fused_experts_are_linear_layers() -> None:
    model = randomized(t.AutoModelForCausalLM.from_config(t.MixtralConfig(**GATED)))
    fused = stored_bits(model)
    unfuse_experts(model)
    apart = stored_bits(model)
    assert apart == fused
    experts = sum(
        one.weight.numel()
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and "experts" in name
    )
    assert experts > 0
    assert fused.weights > experts


def test_models_of_earlier_versions_are_counted_as_they_are() -> None:
    """Their record does not say how large the original was."""
    folder = PROJECT / "tests/fixtures/v1/checkpoints/w4a4-t2"
    model = t.AutoModelForCausalLM.from_pretrained(folder)
    config = spike_config(model)
    assert config is not None
    assert "parameters" not in config.record
    layers = spiking_linears(model).values()
    rest = sum(one.numel() for one in model.parameters())
    expected = rest + sum(layer.in_features * layer.out_features for layer in layers)
    assert stored_bits(model).parameters == expected


def test_the_table_leaves_out_what_is_not_there() -> None:
    bits = {**dict.fromkeys(KINDS, 0), "codes": 200, "scales": 25, "vocabulary": 175}
    found = {row[0]: row[1:] for row in table_rows(StoredBits(bits, 100, 200))}
    assert [*found] == [
        "codes of weights",
        "scales and zero-points",
        "weights of converted layers",
        "tables of the vocabulary",
        "whole model",
    ]
    assert found["weights of converted layers"][:2] == ["2.250", "1.125"]
    assert found["tables of the vocabulary"][:2] == ["-", "0.875"]
    assert found["whole model"] == ["-", "2.000", "0.00", "100.0%"]
