"""Recipes that adapt: the best presets convert every family that can be converted at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from families import FAMILIES, OWN_ATTENTION, build, by_family
from spikellm.core.errors import UnsupportedModelError
from spikellm.models.attention_interface import spiking_attentions


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_every_family_converts_and_reloads(
    family: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model, said = build(family), list[str]()
    spikellm.convert(
        model, tokenizer, "best-w4a4", str(text_file), samples=2, seqlen=24, on_stage=said.append
    )
    record = model.config.quantization_config.record
    alone = family in OWN_ATTENTION
    assert bool(spiking_attentions(model)) != alone
    assert any("computes attention by itself" in note for note in record["notes"]) == alone
    assert any("computes attention by itself" in line for line in said) == alone, "and it is told"
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_what_is_left_out_is_in_the_records(tokenizer: Any, text_file: Path) -> None:
    model = build("phi3")
    result = spikellm.convert(model, tokenizer, "best-w4a4", str(text_file), samples=2, seqlen=24)
    notes = [note for block in result.blocks for note in block.notes]
    assert any(note.startswith("value-output-rotation: ") for note in notes)


@pytest.mark.parametrize(
    ("family", "message"),
    [("bloom", "computes attention by itself"), ("phi3", "leave value-output-rotation out")],
)
def test_without_adapt_the_family_is_refused(
    family: str, message: str, tokenizer: Any, text_file: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spikellm.convert(
            build(family),
            tokenizer,
            "best-w4a4",
            str(text_file),
            samples=2,
            seqlen=24,
            settings=["adapt=false"],
        )
