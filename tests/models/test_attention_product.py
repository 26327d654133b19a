"""Attention by blocks of queries gives what attention at once gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spikellm.models import attention_product
from spikellm.models.attention_interface import observing, spike_attention
from spikellm.models.attention_product import output_only

MASKS = {
    "causal": lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool).tril(),
    "sliding": lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(-3),
    "everything": lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool),
    "padded": lambda tokens: (
        torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - tokens)
        & (torch.arange(tokens) > 2)
    ),
}


@torch.no_grad()
def attend(tokens: int, mask: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, heads, tokens, 8, generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    added = torch.zeros(2, 1, tokens, tokens, dtype=dtype).masked_fill(
        ~MASKS[mask](tokens), torch.finfo(dtype).min
    )
    return spike_attention(nn.Module().eval(), query, key, value, added)


@given(
    tokens=st.integers(1, 40),
    mask=st.sampled_from(sorted(MASKS)),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_blocks_give_the_same(tokens: int, mask: str, seed: int, dtype: torch.dtype) -> None:
    expected, weights = attend(tokens, mask, seed, dtype)
    assert weights is not None
    with pytest.MonkeyPatch.context() as patch, output_only():
        patch.setattr(attention_product, "_QUERIES", 7)
        patch.setattr(attention_product, "_SCORES", 1)
        found, nothing = attend(tokens, mask, seed, dtype)
    assert nothing is None
    torch.testing.assert_close(found, expected)


def test_who_observes_sees_probabilities() -> None:
    seen: list[Tensor] = []
    with output_only(), observing(lambda module, what: seen.append(what.weights)):
        _, weights = attend(5, "causal", 0, torch.float32)
    assert weights is not None
    assert torch.equal(seen[0], weights)
