"""Spiking layers in the place of linear ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

import spikellm
from conftest import first_blocks
from spikellm.nn.execution import spiking_linears
from spikellm.nn.formats import formats
from spikellm.nn.formats.affine import AffineFormat
from spikellm.nn.formats.affine_options import AffineOptions
from spikellm.nn.formats.base import Buffer, LayerShape, Stored
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe.base import WeightOptions


class CountedFormat(AffineFormat):
    """Affine codes, and a buffer as long as there are rows whose zero-point is above the middle."""

    name = "counted"

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        length = shape.sizes[0] if shape.sizes else 0
        return [*super().buffers(shape), Buffer("high_rows", (length,), torch.int32, 0)]

    def fitted_sizes(self, weights: AffineWeights, column_steps: Tensor | None) -> tuple[int, ...]:
        return (len(_high_rows(weights)),)

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(state["high_rows"].shape)

    def write(self, layer: Stored, weights: AffineWeights) -> None:
        super().write(layer, weights)
        layer.get_buffer("high_rows").copy_(_high_rows(weights))


def _high_rows(weights: AffineWeights) -> Tensor:
    return (weights.zero[:, 0] > 7).nonzero()[:, 0].int()


class CountedOptions(AffineOptions):
    format: Literal["counted"] = "counted"  # type: ignore[assignment]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_sizes_are_what_the_format_says_of_coded_weights(
    algorithm: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats._entries, "counted", CountedFormat())
    monkeypatch.setitem(WeightOptions.registry._entries, "counted", CountedOptions)
    model, tokenizer = first_blocks(1)
    settings = ["weights.format=counted", f"algorithm={algorithm}"]
    spikellm.convert(
        model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=32, settings=settings
    )
    layers = spiking_linears(model)
    assert len({layer.sizes for layer in layers.values()}) > 1
    for layer in layers.values():
        assert layer.sizes == (len(layer.get_buffer("high_rows")),)
        assert layer.sizes != (0,)
    again, _ = spikellm.load(spikellm.save(model, tokenizer, tmp_path / "out"))
    tokens = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
