"""Trains of Q, K and V about their baselines: ranges of their own, steps, massive tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spikellm
from conftest import first_blocks
from layers import activation_recipes
from spikellm.models.cache import spiking_cache
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.massive_heads import MassiveHeadCoder
from spikellm.recipe import ActivationRecipe


@given(
    activation_recipes(st.integers(1, 4), st.just(False)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_values_are_thresholds_times_counts(
    settings: ActivationRecipe, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    settings = settings.model_copy(update={"train": "centered", "search_range": False})
    groups = len(settings.group_ranges)
    group = torch.randint(0, groups, (2, 16), generator=generator).to(torch.uint8)
    x = torch.randn(1, 2, 6, 16, generator=generator).to(dtype)
    x[:, :, 2] *= 30
    x[:, :, 4] = 0
    if settings.token_steps:
        beyond = torch.tensor([20.0, torch.inf])
        coder: HeadCoder = MassiveHeadCoder(settings, group, beyond, settings.spikes)
    else:
        coder = HeadCoder(settings, group, price=settings.spikes)
    coded = coder.encode(x)
    count = coder.neuron.fired(coded.codes, coder.baselines(coded))
    values = coder.decode(coded)
    assert bool((count[:, :, 4] == 0).all()), "a token of zeros is silent"
    assert bool(((count == 0) == (values == 0)).all())
    assert bool((torch.sign(count) == torch.sign(values)).all())
    steps = coder.steps_of(coded).expand(count.shape)
    for planes in (coder.neuron.stepped, coder.neuron.binary):
        assert torch.equal(planes(count, steps).sum(0, dtype=torch.int32), count)
    phases = coder.neuron.iterate_phase(count, steps)
    assert torch.equal(sum(plane.int() << place for plane, place in phases), count)


@pytest.fixture(scope="module")
def model(text_file: Path) -> Any:
    loaded, tokenizer = first_blocks(dtype="float32")
    part = "{bits: 4, salient_rate: 0.2, salient_steps: 2, token_steps: 4}"
    settings = (
        f"attention={{query: {{bits: 4}}, key: {part}, value: {part}, rotate: true}}",
        "activations.token_steps=8",
    )
    spikellm.convert(
        loaded, tokenizer, "w4a4-t2", str(text_file), samples=4, seqlen=64, settings=settings
    )
    return loaded


def test_cached_trains_are_those_of_whole_windows(model: Any) -> None:
    tokens = torch.randint(2, 2000, (1, 12), generator=torch.Generator().manual_seed(0))
    whole: list[SpikeTrain] = []
    cached: list[SpikeTrain] = []
    with torch.no_grad():
        with observe_spikes(whole.append):
            model(tokens, use_cache=False)
        cache = spiking_cache(model)
        with observe_spikes(cached.append):
            model(tokens, use_cache=True, past_key_values=cache)
    for part in ("query", "key", "value"):
        one, other = (
            next(train for train in trains if train.part == part) for trains in (whole, cached)
        )
        assert one.neuron.centered
        assert torch.equal(one.fired, other.fired)
        assert bool((one.fired < 0).any())
    inputs = next(train for train in whole if train.part == "input")
    assert torch.equal(inputs.fired, inputs.codes - inputs.baseline.int())


def test_all_modes_give_the_same_logits(model: Any) -> None:
    tokens = torch.randint(2, 2000, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        merged = model(tokens, use_cache=False).logits
        for mode in ("stepped", "binary", "phase"):
            spikellm.set_execution_mode(model, mode)
            assert torch.equal(model(tokens, use_cache=False).logits, merged), mode
    spikellm.set_execution_mode(model, "merged")
