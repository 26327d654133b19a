"""Attention by torch's own function, and by blocks of queries, gives what attention at once
gives.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spikellm.models import attention_product
from spikellm.models.attention_interface import observing, spike_attention
from spikellm.models.attention_product import Attention, attend_in_blocks, output_only

MASKS = {
    "causal": lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool).tril(),
    "sliding": lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(-3),
    "everything": lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool),
    "padded": lambda tokens: (
        torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - tokens)
        & (torch.arange(tokens) > 2)
    ),
}


DRAWN = {
    "tokens": st.integers(1, 40),
    "mask": st.sampled_from(sorted(MASKS)),
    "seed": st.integers(0, 1000),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
}


def fed(tokens: int, mask: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, heads, tokens, 8, generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    added = torch.zeros(2, 1, tokens, tokens, dtype=dtype).masked_fill(
        ~MASKS[mask](tokens), torch.finfo(dtype).min
    )
    return query, key, value, added


@torch.no_grad()
def attend(*drawn: Any, module: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
    return spike_attention((module or nn.Module()).eval(), *fed(*drawn))


def probabilities(*drawn: Any) -> tuple[Tensor, Tensor]:
    """Output and probabilities, as an observer sees them."""
    with observing(lambda *_: None):
        output, weights = attend(*drawn)
    assert weights is not None
    return output, weights


@given(**DRAWN)
def test_where_nobody_looks_torch_attends(
    tokens: int, mask: str, seed: int, dtype: torch.dtype
) -> None:
    drawn = tokens, mask, seed, dtype
    expected, weights = probabilities(*drawn)
    found, nothing = attend(*drawn)
    assert nothing is None
    assert torch.equal(found, expected)
    value = fed(*drawn)[2].repeat_interleave(2, 1).double()
    near = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(
        found.double(), (weights.double() @ value).transpose(1, 2), rtol=near, atol=near
    )


@given(**DRAWN)
def test_blocks_give_the_same(tokens: int, mask: str, seed: int, dtype: torch.dtype) -> None:
    drawn = tokens, mask, seed, dtype
    plain = Attention(None, None, 0.0, None, None)
    expected, _ = plain(*fed(*drawn))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_product, "_QUERIES", 7)
        patch.setattr(attention_product, "_SCORES", 1)
        found = attend_in_blocks(plain, *fed(*drawn))
    torch.testing.assert_close(found, expected)


def test_a_hook_of_the_module_sees_probabilities() -> None:
    drawn = 5, "causal", 0, torch.float32
    module = nn.Module()
    module.register_forward_hook(lambda *_: None)
    _, weights = attend(*drawn, module=module)
    assert weights is not None
    with output_only():
        _, nothing = attend(*drawn, module=module)
    assert nothing is None


def test_who_observes_sees_probabilities() -> None:
    seen: list[Tensor] = []
    with output_only(), observing(lambda module, what: seen.append(what.weights)):
        _, weights = attend(5, "causal", 0, torch.float32)
    assert weights is not None
    assert torch.equal(seen[0], weights)
