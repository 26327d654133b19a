"""Kernels of attention against torch: rows and values bit for bit, products exactly where sums are
integers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import spikellm
from heads import CODERS, coder_and_heads
from native import anew, forget, needs_compiler
from spikellm.kernels import select
from spikellm.kernels.native import build, ops
from spikellm.kernels.native.backend import NativeHeads
from spikellm.models.cache import spiking_cache
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.packed_kv import PackedKV, rows_of
from spikellm.recipe import ActivationRecipe

pytestmark = [pytest.mark.usefixtures("native_kernels"), needs_compiler]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(12345.0), other.nan_to_num(12345.0)) and torch.equal(
        one.isnan(), other.isnan()
    )


def at_level(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELLM_KERNELS_LEVEL", name)
    forget()


@pytest.mark.parametrize("level_name", build.LEVELS)
@given(
    recipe=CODERS,
    channels=st.integers(2, 70),
    seed=st.integers(0, 10**6),
    extreme=st.sampled_from([None, 0.0, 3e38, -3e38, 1e-42, torch.inf, torch.nan]),
)
def test_rows_and_values_have_the_same_bits(
    level_name: str, recipe: ActivationRecipe, channels: int, seed: int, extreme: float | None
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_level(level_name, monkeypatch)
        coder, x, _ = coder_and_heads(recipe, channels, seed)
        if extreme is not None:
            x[1, 1, 1, channels // 2] = extreme
        assert (select(coder.spec, "cpu").name == "native") == (
            recipe.salient_steps * 2**recipe.bits <= 256
        ), "the kernel is taken where codes are bytes"
        rows, values = coder.to_rows(x), coder.fake_quantize(x)
        assert torch.equal(coder.reference.to_rows(x), rows)
        assert same(coder.decode(coder.encode(x)), values)
        assert same(coder.decode(coder.unpack(rows, channels)), values)


@pytest.mark.parametrize("level_name", build.LEVELS)
@given(
    recipe=CODERS,
    channels=st.integers(2, 70),
    shared=st.integers(1, 3),
    queries=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_products_with_rows(
    level_name: str, recipe: ActivationRecipe, channels: int, shared: int, queries: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_level(level_name, monkeypatch)
        coder, x, _ = coder_and_heads(recipe, channels, seed)
        kernels = coder.chosen()
        assume(kernels.most_queries)
        cached = PackedKV(coder.to_rows(x), kernels, channels)
        values = coder.decode(coder.unpack(cached.rows, channels)).repeat_interleave(shared, dim=1)
        generator = torch.Generator().manual_seed(seed)
        query, weights = (
            torch.randn(2, 3 * shared, queries, channels, generator=generator),
            torch.rand(2, 3 * shared, queries, 5, generator=generator),
        )
        expected = query.double() @ values.double().transpose(2, 3)
        bound = 1e-5 * (query.abs() @ values.abs().transpose(2, 3)).max() * recipe.bits
        assert (cached.scores(query) - expected).abs().max() <= bound + 1e-30
        expected = weights.double() @ values.double()
        assert (
            cached.sums(weights) - expected
        ).abs().max() <= 1e-5 * values.abs().max() * 5 * recipe.bits + 1e-30


@given(
    steps=st.sampled_from([1, 2, 4]),
    bits=st.integers(1, 6),
    channels=st.integers(2, 70),
    thresholds=st.sampled_from(["shared", "split"]),
    seed=st.integers(0, 10**6),
)
def test_products_are_exact_where_sums_are_integers(
    steps: int, bits: int, channels: int, thresholds: str, seed: int
) -> None:
    """With thresholds that are powers of two and queries and weights that are small integers, every
    sum is one float exactly.
    """
    extra = (
        {"salient_rate": 0.3, "salient_steps": steps, "thresholds": thresholds, "saliency": "rms"}
        if steps > 1
        else {}
    )
    coder, _, group = coder_and_heads(
        ActivationRecipe.model_validate({"bits": bits, **extra}), channels, seed
    )
    kernels = coder.chosen()
    assert kernels.most_queries
    generator = torch.Generator().manual_seed(seed)
    tops = torch.tensor(coder.settings.group_steps)[group.long()] * coder.neuron.levels
    codes = (
        (torch.rand(2, 3, 7, channels, generator=generator) * (tops + 1).unsqueeze(1)).floor().int()
    )
    ranges = len(set(coder.settings.group_ranges))
    theta = 2.0 ** torch.randint(-2, 3, (2, 3, 7, ranges), generator=generator)
    baseline = torch.randint(0, 2**bits, (2, 3, 7, ranges), generator=generator).float()
    coded = coder.encode(torch.zeros(2, 3, 7, channels))._replace(
        codes=codes, theta=theta, baseline=baseline
    )
    cached, values = PackedKV(coder.pack(coded), kernels, channels), coder.decode(coded)
    query = torch.randint(-9, 10, (2, 3, 2, channels), generator=generator).float()
    assert torch.equal(cached.scores(query), query @ values.transpose(2, 3))
    weights = torch.randint(0, 9, (2, 3, 2, 7), generator=generator).float()
    assert torch.equal(cached.sums(weights), weights @ values)


def test_threads_change_nothing() -> None:
    coder = HeadCoder(ActivationRecipe(bits=4), torch.zeros(4, 64, dtype=torch.uint8))
    x, query, weights = torch.randn(2, 4, 40, 64), torch.randn(2, 8, 1, 64), torch.rand(2, 8, 1, 40)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cached = PackedKV(coder.to_rows(x), coder.chosen(), 64)
            found.append(
                (cached.rows, cached.scores(query), cached.sums(weights), coder.fake_quantize(x))
            )
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_operators_are_sound() -> None:
    coder = HeadCoder(ActivationRecipe(bits=4), torch.zeros(2, 10, dtype=torch.uint8))
    x, kernels = torch.randn(1, 2, 3, 10), coder.chosen()
    assert isinstance(kernels, NativeHeads)
    plan, rows = kernels.plan, coder.to_rows(x)
    torch.library.opcheck(ops.code_heads, (x, plan, rows.shape[-1]))
    torch.library.opcheck(ops.code_heads, (x, plan, 0))
    torch.library.opcheck(ops.key_scores, (torch.randn(1, 4, 2, 10), rows, plan))
    torch.library.opcheck(ops.value_sums, (torch.rand(1, 4, 2, 3), rows, plan, 10))


def test_decode_never_unpacks_the_cache(
    converted_attention: tuple[Any, Any], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = converted_attention
    cache, unpacked = spiking_cache(model), []
    original = HeadCoder.unpack
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        monkeypatch.setattr(
            HeadCoder,
            "unpack",
            lambda self, *arguments: unpacked.append(1) or original(self, *arguments),
        )
        found = model(tokens[:, -1:], past_key_values=cache).logits
        assert not unpacked
        cache.crop(-1)
        monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
        anew(model)
        expected = model(tokens[:, -1:], past_key_values=cache).logits
        assert unpacked
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_same_words(
    converted_attention: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for choice in ("native", "torch"):
        monkeypatch.setenv("SPIKELLM_KERNELS", choice)
        anew(converted_attention[0])
        told.append(spikellm.generate(*converted_attention, "Return a list of", max_new_tokens=24))
    assert told[0] == told[1]


def test_a_placeholder_is_nan_to_whoever_computes_with_it() -> None:
    coder = HeadCoder(ActivationRecipe(bits=4), torch.zeros(2, 10, dtype=torch.uint8))
    cached = PackedKV(coder.to_rows(torch.randn(1, 2, 3, 10)), coder.chosen(), 10)
    stand = cached.placeholder()
    assert stand.shape == (1, 2, 3, 10)
    assert rows_of(stand) is cached
    assert rows_of(stand * 1) is None
    assert (stand * 1).isnan().all()


@pytest.fixture(scope="module")
def converted_attention(text_file: Path) -> tuple[Any, Any]:
    """The bundled model with spiking attention, half a tenth of the channels in two steps."""
    from conftest import BUNDLED

    model, tokenizer = spikellm.load(BUNDLED)
    spikes = (
        "{bits: 4, salient_rate: 0.1, salient_steps: 2, saliency: first-order, thresholds: shared}"
    )
    settings = [f"attention={{query: {{bits: 4}}, key: {spikes}, value: {spikes}}}"]
    spikellm.convert(
        model, tokenizer, "w8a8", str(text_file), samples=2, seqlen=32, settings=settings
    )
    return model, tokenizer
