from __future__ import annotations

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import build
from spikellm.models.families import decoder_of
from spikellm.models.plain_attention import Operands, library_computes, watching_plain
from spikellm.profiling.operations import OperationCounter, count_operations

TOKENS = torch.randint(2, 2000, (1, 9), generator=torch.Generator().manual_seed(0))


def test_attention_runs_as_it_is_while_it_is_watched() -> None:
    model, other = build("llama"), build("llama")
    decoder, before = decoder_of(model), ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert decoder.config._attn_implementation == "sdpa"
    seen: list[Operands] = []
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        with watching_plain(decoder, lambda module, operands: seen.append(operands)):
            assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
            other(TOKENS, use_cache=False)
    config = model.config
    assert len(seen) == config.num_hidden_layers, "of this decoder alone"
    assert seen[0].query.shape == (1, config.num_attention_heads, 9, config.head_dim)
    assert seen[0].key.shape == (1, config.num_key_value_heads, 9, config.head_dim)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_counting_leaves_plain_attention_alone() -> None:
    """The same counts as of eager attention, whose functions belong to the family."""
    model = build("llama")
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        with OperationCounter(model):
            assert model.config._attn_implementation == "sdpa"
            assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
    found = count_operations(model, [TOKENS])["prefill"]
    assert library_computes("sdpa")
    assert not library_computes("eager")
    model.set_attn_implementation("eager")
    assert count_operations(model, [TOKENS])["prefill"] == found
