"""K and V in which massive tokens take more steps, and their cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spikellm
from conftest import first_blocks
from heads import CODERS, coder_and_heads
from spikellm.core.errors import RecipeError, RequestError
from spikellm.models.attention_interface import spiking_attentions
from spikellm.models.cache import cache_bytes, spiking_cache
from spikellm.neurons import make_neuron
from spikellm.nn.execution import set_execution_mode
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.massive_heads import MassiveHeadCoder
from spikellm.nn.packed_kv import PackedKV
from spikellm.nn.validation import validation_error
from spikellm.nn.wide_rows import WideRows
from spikellm.profiling.operations import count_operations
from spikellm.profiling.trace import trace_block
from spikellm.recipe import ActivationRecipe
from spikellm.recipe.load import load_recipe

STEPS = "{bits: 4, token_steps: 8, token_factor: 1.2, token_rate: 0.1}"
SETTINGS = (f"attention.key={STEPS}", f"attention.value={STEPS}")


def massive_coder(
    settings: ActivationRecipe, channels: int, seed: int
) -> tuple[MassiveHeadCoder, HeadCoder, Tensor]:
    """A coder, the same without massive tokens, and heads ``(2, 3, 5, channels)``, of which some
    tokens of some heads are massive.
    """
    plain, x, group = coder_and_heads(settings, channels, seed)
    width = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)).float()
    most = 255 // make_neuron(settings.neuron, settings.bits).levels  # a baseline is one byte
    settings = settings.model_copy(update={"token_steps": min(5, most)})
    beyond = width.transpose(0, 1).flatten(1).median(1).values
    beyond[2] = torch.inf
    share = plain.spec.share
    return MassiveHeadCoder(settings, group, beyond, settings.spikes, share), plain, x


@given(CODERS, st.sampled_from([24, 25, 64]), st.integers(0, 10**6))
def test_rows_give_back_the_codes(settings: ActivationRecipe, channels: int, seed: int) -> None:
    coder, plain, x = massive_coder(settings, channels, seed)
    massive = coder.massive(x)
    assert bool(massive[:, :2].any())
    assert not massive[:, 2].any()
    coded, wide = coder.encode(x), WideRows()
    rows = coder.store(x, wide)
    assert wide.rows is not None
    assert len(wide.rows) == int(massive.sum())
    assert rows.shape[-1] == plain.row_bytes(channels), "rows are as long as ever"
    assert torch.equal(rows[~massive], plain.to_rows(x)[~massive])
    back = coder.fetch(rows, channels, wide)
    for found, expected in zip(back, coded, strict=True):
        assert torch.equal(found, expected)
    values = coder.decode(coded)
    assert torch.equal(coder.fake_quantize(x), values)
    assert torch.equal(values[~massive], plain.fake_quantize(x)[~massive])
    own = coder.massive_values(rows, wide)
    assert own is not None
    assert torch.equal(own.values, values[massive])
    assert torch.equal(
        coder.steps_of(coded).expand(x.shape)[massive].unique(), torch.tensor([coder.token_steps])
    )


@given(CODERS, st.integers(0, 10**6))
def test_products_with_packed_rows(settings: ActivationRecipe, seed: int) -> None:
    coder, _, x = massive_coder(settings, 64, seed)
    kernels, wide = coder.kernels(x), WideRows()
    if kernels.most_queries == 0:
        return
    rows = coder.store(x, wide)
    cached = PackedKV(rows, kernels, 64, coder.massive_values(rows, wide))
    values = coder.fake_quantize(x).repeat_interleave(2, dim=1)
    query, weights = torch.randn(2, 6, 3, 64), torch.rand(2, 6, 3, 5)
    expected = query @ values.transpose(2, 3)
    scale = float(expected.abs().max())
    torch.testing.assert_close(cached.scores(query), expected, rtol=1e-4, atol=1e-5 * scale)
    before, expected = weights.clone(), weights @ values
    scale = float(expected.abs().max())
    torch.testing.assert_close(cached.sums(weights), expected, rtol=1e-4, atol=1e-5 * scale)
    assert torch.equal(weights, before)


def test_massive_tokens_lose_less() -> None:
    settings, group = ActivationRecipe(bits=4, token_steps=8), torch.zeros(2, 64, dtype=torch.uint8)
    x = torch.randn(1, 2, 50, 64)
    coder = MassiveHeadCoder(settings, group, torch.full((2,), 1e-3))
    fine = float((coder.fake_quantize(x) - x).norm())
    coarse = float((HeadCoder(settings, group).fake_quantize(x) - x).norm())
    assert coarse / fine == pytest.approx(8, rel=0.1)


def test_tiny_heads_are_refused() -> None:
    settings, group = ActivationRecipe(bits=2, token_steps=8), torch.zeros(1, 4, dtype=torch.uint8)
    with pytest.raises(RequestError, match="too short to name"):
        MassiveHeadCoder(settings, group, torch.ones(1))


@pytest.mark.parametrize("steps", ["steps", "token_steps"])
def test_baselines_beyond_a_byte_are_refused(steps: str) -> None:
    with pytest.raises(RecipeError, match="value takes up to 4 steps of 8 bits"):
        load_recipe("rtn-w4a4", [f"attention={{key: {{bits: 4}}, value: {{bits: 8, {steps}: 4}}}}"])


@pytest.fixture(scope="module")
def model(text_file: Path) -> Any:
    model, tokenizer = first_blocks(dtype="float32")
    spikellm.convert(
        model, tokenizer, "best-w4a4", str(text_file), samples=4, seqlen=64, settings=SETTINGS
    )
    spikes = [*spiking_attentions(model).values()]
    assert any(bool(one.key_threshold.isfinite().any()) for one in spikes)
    assert any(bool(one.value_threshold.isfinite().any()) for one in spikes)
    return model


def test_decoding_from_the_cache_is_a_whole_pass(model: Any, tokens: Tensor) -> None:
    set_execution_mode(model, "merged")
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = spiking_cache(model)
        parts = [model(tokens[:, :16], past_key_values=cache).logits]
        held = [one for layer in cache.layers for one in layer.wide if one.rows is not None]
        assert held, "some token is massive"
        packed = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert cache_bytes(cache) > packed
        parts += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(16, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


def test_rows_move_with_their_names(model: Any, tokens: Tensor) -> None:
    """Beams: cached rows are repeated, selected, reordered and cropped by the library."""
    with torch.no_grad():
        cache = spiking_cache(model)
        model(tokens, past_key_values=cache)
        other = copy.deepcopy(cache)
        other.batch_repeat_interleave(2)
        other.reorder_cache(torch.tensor([2, 0]))
        next_tokens = torch.tensor([[7], [9]])
        found = model(next_tokens, past_key_values=other).logits
        expected = model(next_tokens.flip(0), past_key_values=cache).logits.flip(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other.reset()
    assert all(one.rows is None for layer in other.layers for one in layer.wide)
    generated = model.generate(tokens, max_new_tokens=4, num_beams=2, do_sample=False)
    assert generated.shape == (2, 28)


def test_steps_are_counted_and_traced(model: Any, tokens: Tensor) -> None:
    counts = count_operations(model, [tokens], decode=3)
    steps = {
        (phase, part): max(
            found.layers[f"model.layers.{i}.self_attn {part}"].average_steps for i in range(2)
        )
        for phase, found in counts.items()
        for part in ("scores", "values")
    }
    assert min(steps.values()) > 1, "of tokens in the cache too"
    assert max(steps.values()) < 3
    firing = counts["prefill"].firing["model.layers.0.self_attn.key"]
    assert firing.slots >= firing.codes
    assert 0 <= float(firing.rates.max()) <= 1
    assert all(trace_block(model, tokens[:1], i).equal for i in range(2))


def test_thresholds_reload_and_are_checked(
    model: Any, tokenizer: Any, tokens: Tensor, tmp_path: Path
) -> None:
    again, _ = spikellm.load(spikellm.save(model, tokenizer, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    spikes = next(iter(spiking_attentions(again).values()))
    spikes.key_threshold.fill_(-1.0)
    assert "key_threshold holds values that are not positive" in str(validation_error(again))
