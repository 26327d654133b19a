"""A format whose buffers are as large as what was fitted asks for, under every algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import spikellm
from conftest import first_blocks
from spikellm.kernels.base import PackedCodes
from spikellm.nn.execution import spiking_linears
from spikellm.nn.formats.base import (
    Buffer,
    LayerShape,
    Stored,
    WeightFormat,
    formats,
    group_of_columns,
    register,
)
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe import Recipe
from spikellm.recipe.base import WeightOptions, register_options

ZERO = 16


class SparseOptions(WeightOptions):
    format: Literal["sparse"] = "sparse"

    @property
    def bits(self) -> int:
        return 4


class SparseFormat(WeightFormat):
    """Integers that are not 0, one after the other, and where they stand."""

    name = "sparse"

    def buffers(self, shape: LayerShape) -> list[Buffer]:
        groups = most_weight_groups(shape.columns, shape.settings, 1)
        return [
            Buffer("present", (shape.rows, shape.columns), torch.bool, 0),
            Buffer("values", shape.sizes or (0,), torch.int8, 1),
            Buffer("weight_scale", (shape.rows, groups), torch.float32, 1),
        ]

    def sizes_for(self, weights: AffineWeights, column_steps: Tensor | None) -> tuple[int, ...]:
        zero = weights.zero[:, :1]
        assert weights.zero.shape[1] == 1
        return (int((weights.codes != zero).sum()),)

    def sizes_of(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (len(state["values"]),)

    def write(self, layer: Stored, weights: AffineWeights) -> None:
        zero = weights.zero[:, group_of_columns(layer.layout())]
        integers = weights.codes.to(torch.int8) - zero.to(torch.int8)
        layer.get_buffer("present").copy_(integers != 0)
        layer.get_buffer("values").copy_(integers[integers != 0])
        layer.weight_scale.copy_(weights.scale)

    def integer_weights(self, layer: Stored, rows: slice) -> Tensor:
        present = layer.get_buffer("present")
        whole = torch.zeros(present.shape, dtype=torch.int16)
        whole[present] = layer.get_buffer("values").to(torch.int16)
        return whole[rows]

    def kernel_bits(self, layer: Stored) -> int:
        return 8

    def packed_codes(self, layer: Stored) -> PackedCodes:
        codes = (self.integer_weights(layer, slice(None)) + ZERO).to(torch.uint8)
        return PackedCodes(codes, torch.full_like(layer.weight_scale, ZERO, dtype=torch.uint8))


@pytest.fixture
def sparse() -> Iterator[None]:
    register_options(SparseOptions)
    register(SparseFormat)
    yield
    del formats._entries["sparse"], WeightOptions.registry._entries["sparse"]


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize(
    "algorithm", ["rtn", "gptq", {"name": "omniquant", "epochs": 0, "lwc": False}]
)
def test_every_algorithm_asks_the_format_for_sizes(
    algorithm: Any, text_file: Path, tmp_path: Path
) -> None:
    found = {}
    for weights in ("sparse", {"format": "affine", "bits": 4}):
        recipe = Recipe.model_validate(
            {
                "name": "r",
                "algorithm": algorithm,
                "weights": weights,
                "activations": {"bits": 4},
            }
        )
        model, tokenizer = first_blocks(1)
        spikellm.convert(model, tokenizer, recipe, str(text_file), samples=2, seqlen=32)
        found[str(weights)] = model, tokenizer
    (model, tokenizer), (plain, _) = found.values()
    for name, layer in spiking_linears(model).items():
        assert layer.sizes == (int(layer.integer_weights().count_nonzero()),)
        other = spiking_linears(plain)[name]
        assert torch.equal(layer.integer_weights(), other.integer_weights())
    spikellm.save(model, tokenizer, tmp_path / "out")
    reloaded, _ = spikellm.load(tmp_path / "out")
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
