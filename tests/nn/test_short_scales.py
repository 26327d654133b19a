"""Scales of 16 bits and packed zero-points: the same layer as with scales of 32 bits that have the
same values, in less memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layers import fit
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.validation import validation_error
from spikellm.recipe import LinearRecipe


def layer_of(scale_bits: int, seed: int, columns: int, **weights: Any) -> SpikingLinear:
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(columns, 11)
    nn.init.normal_(dense.weight, generator=generator)
    nn.init.normal_(dense.bias, generator=generator)
    weights = dict(weights)
    activations, salient = {"bits": weights.pop("inputs", 16)}, weights.pop("salient", {})
    settings = LinearRecipe.model_validate(
        {"weights": {**salient, **weights, "scale_bits": scale_bits}, "activations": activations}
    )
    return fit(dense, settings, sample=torch.randn(50, columns, generator=generator))


WEIGHTS = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 7),
        "group_size": st.sampled_from([None, 1, 5, 16]),
        "symmetric": st.booleans(),
        "salient": st.sampled_from([{}, {"salient_rate": 0.3, "salient_steps": 2}]),
        "inputs": st.sampled_from([4, 16]),
    }
)


@given(WEIGHTS, st.sampled_from(["auto", "torch"]), st.integers(0, 2**31))
def test_it_is_the_layer_whose_scales_have_these_values(
    weights: dict[str, Any], kernels: str, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKELLM_KERNELS", kernels)
        short, long = (layer_of(one, seed, 23, **weights) for one in (16, 32))
        assert torch.equal(short.integer_weights(), long.integer_weights())
        assert short.weight_scale.dtype == torch.bfloat16
        torch.testing.assert_close(
            short.weight_scale.float(), long.weight_scale, rtol=2**-8, atol=0
        )
        long.weight_scale.copy_(short.weight_scale)
        assert torch.equal(short.dense_weight(), long.dense_weight())
        x = torch.randn(7, 23, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(short(x), long(x))
        assert short.weight_bytes < long.weight_bytes


def test_they_are_kept_when_a_model_takes_another_type() -> None:
    layer = layer_of(16, 0, 40, bits=2, group_size=8)
    before, x = layer.weight_scale.clone(), torch.randn(3, 40)
    wanted = layer(x)
    for dtype in (torch.float64, torch.float32):
        layer.to(dtype)
        assert torch.equal(layer.weight_scale, before)
        assert layer.weight_scale.dtype == torch.bfloat16
    assert validation_error(layer) is None
    assert torch.equal(layer(x), wanted)


def test_bits_of_a_weight() -> None:
    layer = layer_of(16, 0, 640, bits=2, group_size=64)
    stored = 8 * sum(
        layer.get_buffer(f"weight_{name}").nbytes for name in ("codes", "scale", "zero")
    )
    assert stored / layer.integer_weights().numel() == 2 + (16 + 2) / 64 + 4 / 640


def test_a_zero_point_out_of_range_is_found() -> None:
    layer = layer_of(16, 0, 40, bits=3, group_size=8, salient_rate=0.2, salient_steps=2)
    layer.get_buffer("weight_zero").fill_(255)
    assert "weight_zero exceeds the largest code" in str(validation_error(layer))
