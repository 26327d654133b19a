"""A model whose attention spikes runs through our attention interface, or not at all."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import spikellm
from families import build
from spikellm.core.errors import RequestError, UnsupportedModelError

CODED = "{bits: 4}"
ATTENTION = [f"attention={{query: {CODED}, key: {CODED}, value: {CODED}, rotate: true}}"]


@pytest.fixture(scope="module")
def spiking(tokenizer: Any, text_file: Path) -> Any:
    model = build("llama")
    spikellm.convert(
        model, tokenizer, "w8a8", str(text_file), samples=2, seqlen=24, settings=ATTENTION
    )
    return model


@pytest.fixture
def model(spiking: Any) -> Any:
    return copy.deepcopy(spiking)


def passes(model: Any, tokens: torch.Tensor) -> list[Any]:
    """Ways to begin a forward pass."""
    return [
        lambda: model(tokens, use_cache=False),
        lambda: model(tokens),
        lambda: model.model(tokens),
        lambda: model.generate(tokens, max_new_tokens=2, do_sample=False),
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "paged|eager"])
def test_another_implementation_is_refused_and_ours_is_taken_again(
    model: Any, tokens: torch.Tensor, implementation: str
) -> None:
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation(implementation)
        for run in passes(model, tokens):
            with pytest.raises(RequestError, match=r"set_attn_implementation\('spike'\)"):
                run()
        model.set_attn_implementation("spike")
        assert torch.equal(model(tokens).logits, expected)


def test_the_attribute_of_the_config_is_refused(model: Any, tokens: torch.Tensor) -> None:
    model.config._attn_implementation = "sdpa"
    with pytest.raises(RequestError, match="'sdpa'"):
        model(tokens)


def test_the_config_of_one_layer_is_refused(model: Any, tokens: torch.Tensor) -> None:
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    with pytest.raises(RequestError, match=r"LlamaAttention is 'sdpa'"):
        model(tokens)


def test_the_argument_of_a_reload_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    spikellm.save(model, tokenizer, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(RequestError, match="attn_implementation is 'sdpa'"):
        again(tmp_path / "out", attn_implementation="sdpa")
    assert again(tmp_path / "out").config._attn_implementation == "spike"
    assert again(tmp_path / "out", attn_implementation="spike") is not None


@pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static"])
def test_caches_that_hold_no_spikes_are_named(model: Any, tokens: torch.Tensor, cache: str) -> None:
    words = {"static": "StaticCache", "offloaded": "offloaded DynamicCache"}
    with pytest.raises(UnsupportedModelError, match=words.get(cache, "offloaded StaticCache")):
        model.generate(tokens, max_new_tokens=2, cache_implementation=cache)


def test_continuous_batching_is_refused_with_what_to_use(model: Any) -> None:
    with pytest.raises(RequestError, match="left-padded batch"):
        model.generate_batch([[1, 2, 3]])


def test_copies_and_pickles_give_the_same(
    model: Any, tokenizer: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        expected = model(tokens).logits
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(again(tokens).logits, expected)
            again.set_attn_implementation("eager")
            with pytest.raises(RequestError):
                again(tokens)


@pytest.mark.slow
def test_a_pickle_runs_in_a_fresh_process(model: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    torch.save((model, tokens), tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(tokens).logits
    code = (
        "import sys, torch\n"
        "model, tokens = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "torch.save(model(tokens).logits.detach(), sys.argv[1] + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
