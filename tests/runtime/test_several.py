"""Several generations in one step get what each gets alone, whatever length the others have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import first_blocks
from families import FAMILIES, by_family
from native import needs_compiler
from runtime.test_decoder_step import CONFIGS, SPIKES, VOCABULARY, converted, is_native
from spikellm.runtime.decoder_step import several
from spikellm.runtime.decoder_step.several import decode_each, decodes_together

LENGTHS = (5, 17, 1, 9, 30)


@torch.no_grad()
def begun(model: Any) -> tuple[list[int], list[Any]]:
    """A next token and a cache for every length; the model has its step, if it has one."""
    filled = model(torch.ones(1, 2, dtype=torch.long), use_cache=True).past_key_values
    model(torch.ones(1, 1, dtype=torch.long), past_key_values=filled)
    generator = torch.Generator().manual_seed(0)
    tokens, caches = [], []
    for length in LENGTHS:
        prompt = torch.randint(2, 2000, (1, length + 1), generator=generator)
        caches.append(model(prompt[:, :-1], use_cache=True).past_key_values)
        tokens.append(int(prompt[0, -1]))
    return tokens, caches


@torch.no_grad()
def alone(model: Any, token: int, cache: Any, count: int) -> list[torch.Tensor]:
    """Logits of a greedy generation, one forward pass a token."""
    found = []
    for _ in range(count):
        found.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
        token = int(found[-1].argmax())
    return found


def require_same(model: Any, count: int = 12) -> None:
    tokens, caches = begun(model)
    wanted = [
        alone(model, token, copy.deepcopy(cache), count)
        for token, cache in zip(tokens, caches, strict=True)
    ]
    for step in range(count):
        rows = decode_each(model, tokens, caches)
        for row, one in zip(rows, wanted, strict=True):
            assert torch.equal(row, one[step])
        tokens = rows.argmax(1).tolist()


@needs_compiler
@pytest.mark.parametrize("family", by_family(CONFIGS))
def test_each_gets_the_bits_that_it_gets_alone(family: str, text_file: Path) -> None:
    """With windows that slide at different moments, and a vocabulary of codes."""
    settings = [SPIKES, VOCABULARY] if family == "llama" else [SPIKES]
    model = converted(family, text_file, *settings, dtype=torch.float32)
    require_same(model)
    assert is_native(model)
    assert decodes_together(model)


@needs_compiler
def test_sixteen_bits(text_file: Path) -> None:
    model = converted("llama", text_file, SPIKES, dtype=torch.bfloat16)
    require_same(model)
    assert decodes_together(model)


@needs_compiler
def test_generations_come_and_go(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one step takes, and some that end before the others."""
    monkeypatch.setattr(several, "MOST_TOKENS", 2)
    model = converted("llama", text_file, dtype=torch.float32)
    tokens, caches = begun(model)
    wanted = [
        alone(model, token, copy.deepcopy(cache), 6)
        for token, cache in zip(tokens, caches, strict=True)
    ]
    for step in range(6):
        kept = range(len(tokens)) if step < 3 else (4, 1, 2)
        rows = decode_each(model, [tokens[one] for one in kept], [caches[one] for one in kept])
        for one, row in zip(kept, rows, strict=True):
            assert torch.equal(row, wanted[one][step])
            tokens[one] = int(row.argmax())


def test_models_without_a_native_step(text_file: Path) -> None:
    """An original decodes one generation after the other."""
    model, _ = first_blocks()
    require_same(model, 3)
    assert not decodes_together(model)
    config = FAMILIES["mistral"]()
    require_same(transformers.AutoModelForCausalLM.from_config(config).eval(), 3)
