"""Q and K mapped against each other and K centered as it is attended to: products stay, and less is
lost when they are coded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spikellm
from conftest import first_blocks
from spikellm.conversion.attention import set_center_and_map
from spikellm.core.errors import RecipeError
from spikellm.models.attention_interface import Observation
from spikellm.models.cache import spiking_cache
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.observers.head_moments import HeadMoments
from spikellm.quantization.balance import balanced_map
from spikellm.recipe import ActivationRecipe, AttentionRecipe
from spikellm.recipe.load import load_recipe

FOUR = ActivationRecipe(bits=4)
ATTENTION = (
    "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}, rotate: true, center: true,"
    " balance: true}"
)


def spiking(channels: int, *, balance: bool = True) -> SpikingAttention:
    settings = AttentionRecipe(
        query=FOUR, key=FOUR, value=FOUR, rotate=True, center=True, balance=balance
    )
    return SpikingAttention(HeadShape(2, channels, channels), settings)


def heads(channels: int, tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Uneven Q of four heads and K of two, the first key a sink: ``(2, heads, tokens,
    channels)``.
    """
    generator = torch.Generator().manual_seed(channels)
    size = torch.logspace(-1, 1, channels)
    query = torch.randn(2, 4, tokens, channels, generator=generator) / size
    key = torch.randn(2, 2, tokens, channels, generator=generator) * size
    key[:, :, 0] = 3 * query.mean((1, 2))[:, None] / query.mean((1, 2)).square().mean()
    return query, key


def observed(query: Tensor, key: Tensor) -> Observation:
    weights = probabilities(query, key)
    wide = key.repeat_interleave(2, dim=1)
    return Observation(query, key, key, weights, weights @ wide)


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / key.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


@pytest.mark.parametrize("channels", [16, 15])
def test_products_stay(channels: int) -> None:
    query, key = heads(channels)
    spikes = spiking(channels)
    moments = HeadMoments()
    moments.update(observed(query, key))
    set_center_and_map(spikes, moments)
    assert float((spikes.key_map - torch.eye(2)).abs().max()) > 0.1, "and yet there is a map"
    found = probabilities(spikes.turned_query(query), spikes.turned_key(key))
    torch.testing.assert_close(found, probabilities(query, key), rtol=1e-3, atol=1e-5)
    turned = spikes.turned_query(query)
    scores = turned @ spikes.turned_key(key).repeat_interleave(2, dim=1).transpose(2, 3)
    whole = query @ key.repeat_interleave(2, dim=1).transpose(2, 3)
    torch.testing.assert_close(scores + spikes.center_scores(turned), whole, rtol=1e-3, atol=1e-2)


def test_keys_count_as_they_are_attended_to() -> None:
    query, key = heads(8, tokens=5)
    moments = HeadMoments()
    moments.update(observed(query, key))
    weights = probabilities(query, key)
    for head in range(2):
        received = weights[:, 2 * head : 2 * head + 2].sum((1, 2)).flatten()
        own = key[:, head].flatten(0, 1)
        mean = (received[:, None] * own).sum(0) / received.sum()
        torch.testing.assert_close(moments.center()[head].float(), mean, rtol=1e-4, atol=1e-5)
        away = own - mean
        spread = (away.T * received) @ away / received.sum()
        found = moments.spread(moments.center())[head].float()
        torch.testing.assert_close(found, spread, rtol=1e-3, atol=1e-4)


def test_balanced_heads_lose_less() -> None:
    query, key = heads(64)
    exact, losses = probabilities(query, key), []
    for balance in (False, True):
        spikes = spiking(64, balance=balance)
        moments = HeadMoments()
        moments.update(observed(query, key))
        set_center_and_map(spikes, moments)
        coded, _ = spikes.code_key_value(key, key)
        found = probabilities(spikes.code("query", spikes.turned_query(query)), coded)
        losses.append(float((exact * (exact.clamp(min=1e-9) / found.clamp(min=1e-9)).log()).sum()))
    assert losses[1] < 0.7 * losses[0]


def test_the_map_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    moments, energy = (
        x.T @ x for x in torch.randn(2, 40, 6, generator=generator, dtype=torch.float64)
    )

    def loss(one: Tensor) -> float:
        back = torch.linalg.inv(one)
        return float(torch.trace(one @ moments @ one.T) * torch.trace(back.T @ energy @ back))

    best = balanced_map(moments, energy)
    torch.testing.assert_close(  # both sides are alike behind it
        best @ moments @ best,
        torch.linalg.inv(best) @ energy @ torch.linalg.inv(best),
        rtol=0.1,
        atol=0.1 * float(moments.mean().abs()),
    )
    for _ in range(20):
        other = best + 0.1 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
        assert loss(best) < loss(other) * 1.001
    assert loss(best) < 0.98 * loss(torch.eye(6, dtype=torch.float64))


@pytest.fixture(scope="module")
def model(text_file: Path) -> tuple[Any, Any]:
    model, tokenizer = first_blocks(2, dtype="float32")
    spikellm.convert(
        model, tokenizer, "rtn-w4a4", str(text_file), samples=4, seqlen=64, settings=[ATTENTION]
    )
    return model, tokenizer


def test_decoding_from_the_cache_is_a_whole_pass(model: tuple[Any, Any], tokens: Tensor) -> None:
    with torch.no_grad():
        whole = model[0](tokens, use_cache=False).logits
        cache = spiking_cache(model[0])
        steps = [
            model[0](tokens[:, [place]], past_key_values=cache).logits
            for place in range(tokens.shape[1])
        ]
    found = torch.cat(steps, 1)
    assert torch.allclose(found, whole, atol=2e-2 * float(whole.abs().max()))


def test_reloaded_it_is_the_same(model: tuple[Any, Any], tokens: Tensor, tmp_path: Path) -> None:
    spikellm.save(*model, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model[0](tokens).logits, again(tokens).logits)
    assert any(name.endswith("key_map") for name in again.state_dict())


@pytest.mark.parametrize("missing", ["rotate: true, ", "query: {bits: 4}, key: {bits: 4}, "])
def test_a_map_without_effect_is_refused(missing: str) -> None:
    with pytest.raises(RecipeError, match="balance has no effect|coded together"):
        load_recipe("rtn-w4a4", [ATTENTION.replace(missing, "")])


def test_maps_and_coders_are_prepared_once_for_both() -> None:
    spikes, (query, key) = spiking(8), heads(8)
    spikes.turned_key(key), spikes.code("query", spikes.turned_query(query))
    maps, coders = spikes._maps, spikes._coders
    spikes.turned_key(key), spikes.code("query", spikes.turned_query(query))
    assert maps is not None
    assert coders is not None
    assert spikes._maps is maps
    assert spikes._coders is coders
