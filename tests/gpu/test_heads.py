"""Coding of heads and rotations under Triton's interpreter: the same bits as in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spikellm
from budget import examples
from conftest import first_blocks
from heads import coder_and_heads
from interpreted import QUIET, skip_unless_interpreted, triton_kernels
from native import anew
from spikellm.kernels import MixSpec, select
from spikellm.kernels.base import backends
from spikellm.nn.packed_kv import PackedKV
from spikellm.quantization import hadamard
from spikellm.recipe import ActivationRecipe

skip_unless_interpreted()
pytestmark = QUIET
__all__ = ["triton_kernels"]


RECIPES: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 4, "symmetric": True},
    {"bits": 2, "neuron": "ternary", "symmetric": True},
    {"bits": 3, "salient_rate": 0.3, "salient_steps": 2, "saliency": "rms"},
    {
        **{"bits": 4, "salient_rate": 0.3, "salient_steps": 2, "saliency": "rms"},
        "thresholds": "split",
    },
    {"bits": 8},
]


@given(
    st.sampled_from(RECIPES),
    st.integers(2, 70),
    st.sampled_from([0.0, 1e-44, 1.0, 3e38, float("nan"), float("inf")]),
    st.integers(-3, 3),
)
@examples(40)
def test_the_same_bits_as_torch(
    recipe: dict[str, Any], channels: int, odd: float, scale: int
) -> None:
    coder, x, _ = coder_and_heads(ActivationRecipe.model_validate(recipe), channels, 5)
    assert select(coder.spec, "cpu").name == "triton"
    x = x * 10.0**scale
    x[0, 0, 1, 0] = odd
    found = backends["triton"].prepare_heads(coder.spec)
    expected = backends["torch"].prepare_heads(coder.spec)
    values, wanted = found.fake_quantize(x), expected.fake_quantize(x)
    assert torch.equal(values.isnan(), wanted.isnan())
    assert torch.equal(values.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(found.to_rows(x), expected.to_rows(x))


@given(
    st.sampled_from(RECIPES),
    st.integers(2, 70),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 5, 33, 600]),
)
@examples(30)
def test_products_with_rows(
    recipe: dict[str, Any], channels: int, shared: int, queries: int, tokens: int
) -> None:
    """More tokens than a program unpacks at a time, and than one sums."""
    coder, _, _ = coder_and_heads(ActivationRecipe.model_validate(recipe), channels, 5)
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, 3, tokens, channels, generator=generator)
    kernels = coder.chosen()
    assert kernels.most_queries
    cached = PackedKV(coder.to_rows(x), kernels, channels)
    values = coder.decode(coder.unpack(cached.rows, channels)).repeat_interleave(shared, dim=1)
    query = torch.randn(2, 3 * shared, queries, channels, generator=generator)
    weights = torch.rand(2, 3 * shared, queries, tokens, generator=generator)
    expected = query.double() @ values.double().transpose(2, 3)
    torch.testing.assert_close(cached.scores(query).double(), expected, rtol=1e-5, atol=1e-4)
    expected = weights.double() @ values.double()
    torch.testing.assert_close(cached.sums(weights).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 64, 70, 576])
def test_rotations(channels: int) -> None:
    spec = MixSpec(channels)
    assert select(spec, "cpu").name == "triton"
    run = backends["triton"].prepare_mix(spec)
    for shape in ((3, channels), (2, 2, channels), (0, channels)):
        x = torch.randn(shape)
        assert torch.equal(run(x), hadamard.mix(x))
    wide = torch.randn(2, channels).double()
    assert torch.equal(run(wide), hadamard.mix(wide))
    apart = torch.randn(channels, 3).T
    assert torch.equal(run(apart), hadamard.mix(apart))


def test_a_model_whose_attention_spikes(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coded once in a prompt, and into a cache that grows."""
    model, tokenizer = first_blocks()
    spikellm.convert(model, tokenizer, "quarot-w4a4", str(text_file), samples=2, seqlen=32)
    tokens = tokenizer("def main():\n    return", return_tensors="pt").input_ids

    def said() -> torch.Tensor:
        anew(model)
        with torch.no_grad():
            first = model(tokens, use_cache=True)
            last = model(tokens[:, :1], past_key_values=first.past_key_values)
        return torch.cat([first.logits, last.logits], 1)

    found = said()
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    expected = said()
    prompt = tokens.shape[1]
    assert torch.equal(found[:, :prompt], expected[:, :prompt])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
