"""Integer weights as a compressed-tensors checkpoint, read back by the library's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.nn.execution import spiking_linears

pytest.importorskip("compressed_tensors")

ALONE = ("activations.bits=16",)


def converted(text: Path, folder: Path, *settings: str, recipe: str = "rtn-w4a4") -> Any:
    model, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(model, tokenizer, recipe, str(text), samples=2, seqlen=32, settings=settings)
    spikellm.save(model, tokenizer, folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        ("weights.group_size=64",),
        (),
        ("weights.bits=3", "weights.group_size=32"),
        ("weights.bits=8",),
        ("weights.bits=2", "weights.group_size=64"),
    ],
)
def test_reader_gives_the_same_weights(
    settings: tuple[str, ...], text_file: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = converted(text_file, tmp_path / "in", *ALONE, "weights.scale_bits=16", *settings)
    given = ["export", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*given, "--format", "compressed-tensors"]) == 0
    written = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert "spikes" not in str(written["not_expressed"])
    assert written["files"][0]["layers"] == len(spiking_linears(model))
    assert written["files"][0]["scales_rounded_by"] == 0
    found, tokenizer = spikellm.load(tmp_path / "out")
    for name, layer in spiking_linears(model).items():
        weight = found.get_submodule(name).weight
        assert torch.equal(weight, layer.dense_weight().to(weight.dtype)), name
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert len(tokenizer) == len(spikellm.load(BUNDLED)[1])
    with torch.no_grad():
        logits, expected = found(tokens).logits.float(), model(tokens).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("weights.bits=8", "activations.bits=8"),
        ("weights.group_size=64", "activations.bits=8"),
        ("weights.bits=2", "weights.group_size=32"),
    ],
)
def test_reader_fires_the_same_codes(
    settings: tuple[str, ...], text_file: Path, tmp_path: Path
) -> None:
    """In float32 the reader's dynamic quantization of a layer's input is its spikes, each layer's
    output the same to rounding; with as good as no exceptions where a value lies between codes.
    """
    import transformers

    model, tokenizer = spikellm.load(BUNDLED, dtype="float32")
    spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=2, seqlen=32, settings=settings
    )
    spikellm.save(model, tokenizer, tmp_path / "in")
    given = ["export", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*given, "--format", "compressed-tensors"]) == 0
    written = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert "codes are spikes" in str(written["not_expressed"])
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found(torch.ones(1, 4, dtype=torch.long))  # at its first pass it unpacks its weights
    generator = torch.Generator().manual_seed(0)
    for name, layer in spiking_linears(model).items():
        x = torch.randn(1, 20, layer.in_features, generator=generator)
        with torch.no_grad():
            wanted, output = layer(x), found.get_submodule(name)(x)
        far = (output - wanted).abs().amax(-1) > 1e-4 * wanted.abs().max()
        assert int(far.sum()) <= 1, name


def test_inputs_that_are_left_out_are_told(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    converted(text_file, tmp_path / "in")
    given = ["export", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*given, "--format", "compressed-tensors"]) == 0
    spikellm.load(tmp_path / "out")
    assert "quantizes the inputs of its layers too" in caplog.text


def test_long_scales_are_rounded_and_told(text_file: Path, tmp_path: Path) -> None:
    converted(text_file, tmp_path / "in", *ALONE)
    given = ["export", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*given, "--format", "compressed-tensors"]) == 0
    written = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert 0 < written["files"][0]["scales_rounded_by"] <= 2.0**-8


@pytest.mark.parametrize(
    ("recipe", "settings", "why"),
    [
        ("w4a4-t2", (), "take different ranges or numbers of steps"),
        ("rtn-w4a4", ("activations.symmetric=true",), "the only ones that"),
        ("rtn-w4a4", ("attention.query={bits: 8}",), "codes Q, K and V"),
        ("rtn-w4a4", (*ALONE, "weights.group_size=80"), "no multiple of the group"),
        ("rtn-w4a4", (*ALONE, "vocabulary.bits=8"), "no words for"),
        ("ternary-1.0", ("algorithm.rounds=1",), "weights are ternary"),
    ],
)
def test_what_it_cannot_say_is_refused(
    recipe: str,
    settings: tuple[str, ...],
    why: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    converted(text_file, tmp_path / "in", *settings, recipe=recipe)
    given = ["export", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*given, "--format", "compressed-tensors"]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_that_is_not_converted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["export", str(BUNDLED), str(tmp_path / "out"), "--format", "compressed-tensors"]
    assert main(given) == 2
    assert "is not converted" in capsys.readouterr().err
