"""Layers as blocks of GGUF files, read back by the ``gguf`` package: the same bits, or a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budget import examples
from layers import fit
from native import additive, partly_binary
from spikellm.core.errors import RequestError, SpikeLLMError
from spikellm.export.gguf_blocks import blocks_of, type_of
from spikellm.export.gguf_types import block_of
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.affine import AffineWeights
from spikellm.recipe import LinearRecipe

gguf = pytest.importorskip("gguf")

UNCODED = {"bits": 16}
ROWS = 6


def affine(columns: int, seed: int = 0, **weights: Any) -> SpikingLinear:
    """A layer of any codes and zero-points that its recipe allows, scales over many sizes."""
    settings = LinearRecipe.model_validate(
        {"weights": {"scale_bits": 16, **weights}, "activations": UNCODED}
    )
    layer, generator = SpikingLinear(columns, ROWS, settings), torch.Generator().manual_seed(seed)
    top, groups = 2**settings.weights.bits - 1, len(layer.layout().weight_groups)
    symmetric = settings.weights.symmetric

    def drawn(lowest: int, *shape: int) -> torch.Tensor:
        return torch.randint(lowest, top + 1, shape, generator=generator).to(torch.uint8)

    zero = drawn(0, ROWS, groups)
    if symmetric:
        zero.fill_((top + 1) // 2)
    sizes = torch.randint(-16, 15, (ROWS, groups), generator=generator)
    scale = (1 + torch.rand(ROWS, groups, generator=generator)) * 2.0**sizes
    layer.set_weights(AffineWeights(drawn(int(symmetric), ROWS, columns), scale, zero))
    return layer


def ternary(columns: int, group: int | None, seed: int = 0) -> SpikingLinear:
    weights = {"format": "ternary", "group_size": group, "scale_bits": 16}
    settings = LinearRecipe.model_validate({"weights": weights, "activations": UNCODED})
    layer = SpikingLinear(columns, ROWS, settings, sizes=(columns,))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (ROWS, columns), generator=generator).to(torch.int8)
    groups = len(layer.layout().weight_groups)
    scale = torch.rand(ROWS, groups, generator=generator) + 2.0**-10
    layer.set_weights(AffineWeights(codes, scale, torch.zeros(ROWS, groups, dtype=torch.uint8)))
    return layer


def read(layer: SpikingLinear) -> tuple[str, torch.Tensor]:
    name = type_of(layer)
    blocks = blocks_of(layer, name)
    values, size = block_of(name)
    assert blocks.shape == (ROWS, layer.in_features // values * size)
    kind = gguf.GGMLQuantizationType[name.upper()]
    return name, torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@examples(60)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, 32, 64, 96, 256]),
    st.sampled_from([32, 96, 256, 512]),
    st.integers(0, 2**31),
)
def test_integers_are_the_same_numbers(
    bits: int, symmetric: bool, group: int | None, columns: int, seed: int
) -> None:
    layer = affine(columns, seed, bits=bits, symmetric=symmetric, group_size=group)
    integers = layer.integer_weights()
    reach = max(int(integers.max()), -1 - int(integers.min()))
    if reach > 127:
        with pytest.raises(RequestError, match=r"set weights\.symmetric=true"):
            type_of(layer)
        return
    name, values = read(layer)
    assert same_bits(values, layer.dense_weight())
    smallest = "q4_0" if reach < 8 else "q5_0" if reach < 16 else "q8_0"
    assert name == smallest or (name == "tq2_0" and int(integers.abs().max()) <= 1)


@examples(30)
@given(
    st.sampled_from([(256, None), (512, 256), (768, 512), (576, None), (512, 64), (96, 32)]),
    st.integers(0, 2**31),
)
def test_ternary_weights_are_the_same_numbers(shape: tuple[int, int | None], seed: int) -> None:
    columns, group = shape
    name, values = read(ternary(columns, group, seed))
    layer = ternary(columns, group, seed)
    assert same_bits(values, layer.dense_weight())
    fits = columns % 256 == 0 and (group is None or group % 256 == 0)
    assert name == ("tq2_0" if fits else "q4_0")


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ({"bits": 4, "symmetric": True}, "q4_0"),
        ({"bits": 4}, "q5_0"),
        ({"bits": 3}, "q4_0"),
        ({"bits": 2, "group_size": 64}, "q4_0"),
        ({"bits": 2, "symmetric": True}, "tq2_0"),
        ({"bits": 5, "symmetric": True}, "q5_0"),
        ({"bits": 8, "symmetric": True, "group_size": 32}, "q8_0"),
    ],
)
def test_smallest_type(weights: dict[str, Any], name: str) -> None:
    assert type_of(affine(256, **weights)) == name


def test_float32_scales_that_float16_has_too() -> None:
    layer = affine(64, scale_bits=32, bits=4, symmetric=True, group_size=32)
    layer.weight_scale.copy_(layer.weight_scale.half())
    assert same_bits(read(layer)[1], layer.dense_weight())


def of_spikes(columns: int) -> SpikingLinear:
    dense = torch.nn.Linear(columns, ROWS)
    return fit(dense, LinearRecipe.model_validate({"weights": {"scale_bits": 16}}))


def of_two_steps() -> SpikingLinear:
    generator = torch.Generator().manual_seed(0)
    return additive(64, ROWS, torch.tensor([1, 2] * 32, dtype=torch.uint8), generator)


def scaled(by: float, **weights: Any) -> SpikingLinear:
    layer = affine(64, bits=4, symmetric=True, **weights)
    layer.weight_scale.fill_(by)
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: of_spikes(64), "inputs are spikes"),
        (lambda: partly_binary(64, ROWS, 0.1, None, 0), "weights are partly-binary"),
        (of_two_steps, "different numbers of steps"),
        (lambda: affine(40), "ends at 40 of 40 inputs"),
        (lambda: affine(96, group_size=48), "ends at 48 of 96 inputs"),
        (lambda: scaled(0.1, scale_bits=32), r"more bits than float16.*weights\.scale_bits=16"),
        (lambda: scaled(1.0078125 * 2.0**-20), "the scale 9.61e-07 is out of the range"),
        (lambda: scaled(2.0**16), "the scale 6.55e.04 is out of the range"),
        (lambda: affine(64, bits=8), r"integers reach from .*weights\.symmetric=true"),
    ],
)
def test_what_no_block_holds_is_refused(layer: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        type_of(layer())
    assert "\n" not in str(caught.value)


def test_blocks_of_other_weights_are_noticed() -> None:
    layer = affine(64, bits=4)
    assert type_of(layer) == "q5_0"
    with pytest.raises(SpikeLLMError, match="read as other weights"):
        blocks_of(layer, "q4_0")
