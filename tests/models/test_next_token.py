"""Losses and logits some tokens at a time are those of the whole pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES, build, by_family
from spikellm.data.shards import WindowShard
from spikellm.models import next_token
from spikellm.observers.sensitivity import output_sensitivity


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let 5 tokens of a vocabulary of 2,048 be all that is held."""
    return lambda: monkeypatch.setattr(next_token, "_NUMBERS", 5 * 2 * 2048)


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_pieces_are_the_whole(family: str, tokens: torch.Tensor, few: Callable[[], None]) -> None:
    model = build(family)
    batch = tokens[:2]
    with torch.no_grad():
        whole = model(batch, use_cache=False).logits
        loss = next_token.summed_loss(model, batch)
        few()
        pieces = list(next_token.piecewise_outputs(model, batch, use_cache=False))
        assert [first for first, _ in pieces] == list(range(0, batch.shape[1], 5))
        found = torch.cat([output.logits for _, output in pieces], dim=1)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
        assert next_token.summed_loss(model, batch) == pytest.approx(loss, rel=1e-5)
        assert torch.equal(model(batch, use_cache=False).logits, whole), "nothing stays behind"


def test_gradients_of_pieces_are_those_of_the_whole(
    tokens: torch.Tensor, few: Callable[[], None]
) -> None:
    def sensitivity() -> dict[str, torch.Tensor]:
        model: Any = build("llama")
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return output_sensitivity(model, WindowShard(tokens[:2], 0, tokens[:2].numel()), names)

    whole = sensitivity()
    few()
    for name, found in sensitivity().items():
        torch.testing.assert_close(found, whole[name], rtol=1e-3, atol=1e-9)


def test_the_cache_comes_with_every_piece(tokens: torch.Tensor, few: Callable[[], None]) -> None:
    model = build("llama")
    few()
    with torch.no_grad():
        outputs = [
            one for _, one in next_token.piecewise_outputs(model, tokens[:2], use_cache=True)
        ]
    assert len(outputs) > 1
    assert outputs[-1].past_key_values.get_seq_length() == tokens.shape[1]
