from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import spikellm
from conftest import first_blocks
from families import build
from layers import fit
from spikellm.neurons import make_neuron
from spikellm.nn.attention import HeadShape, SpikingAttention
from spikellm.nn.execution import spiking_linears
from spikellm.profiling.counts import DENSE, EXECUTION_MODES, Counts, Firing
from spikellm.profiling.elementary import Work
from spikellm.profiling.operations import count_operations
from spikellm.profiling.work import (
    coder_of,
    work_of_coding,
    work_of_firing,
    work_of_norm,
    work_of_rotary,
    work_of_scaling,
    work_of_softmax,
)
from spikellm.profiling.work_counter import WorkCounter, _coders_of
from spikellm.recipe import ActivationRecipe, AttentionRecipe, LinearRecipe


def tokens(shape: tuple[int, int] = (2, 12)) -> torch.Tensor:
    return torch.randint(2, 2000, shape, generator=torch.Generator().manual_seed(0))


def test_coding_by_hand() -> None:
    """Three tokens of eight values."""
    gif, ternary = make_neuron("gif", 4), make_neuron("ternary", 2)
    placed = coder_of(gif, 1, symmetric=False)
    assert work_of_coding(24, 3, placed) == Work(
        compare=24 * 4 + 3 * 3,
        multiply=24 + 3 * 3,
        add=24 + 3,
        round=24 + 3,
        divide=3,
    )
    middle = coder_of(gif, 1, symmetric=True, shared=True)
    assert work_of_coding(24, 3, middle) == Work(
        compare=24 * 4 + 3 * 3, multiply=24 + 3 * 3, add=24, round=24, divide=3
    )
    signed = coder_of(ternary, 1, symmetric=False)
    assert work_of_coding(24, 3, signed)["add"] == 0
    fixed = coder_of(gif, 8, symmetric=False, source="calibration")
    constant = work_of_coding(10, 8, fixed)
    assert constant == Work(compare=20, multiply=10, round=10, add=10), "nothing by threshold"
    mean = coder_of(ternary, 1, symmetric=True, source="mean")
    assert work_of_coding(24, 3, mean) == Work(
        compare=24 * 2, multiply=24 + 3, add=24, round=24, divide=3
    )


def test_means_are_counted_where_thresholds_follow_them() -> None:
    settings = ActivationRecipe(bits=2, neuron="ternary", symmetric=True, threshold_from="mean")
    layer = fit(nn.Linear(8, 4), LinearRecipe(activations=settings))
    counts = Counts(0)
    WorkCounter(lambda: counts).linear(layer, 3)
    assert counts.work["coding"]["merged"]["add"] == 24
    heads = AttentionRecipe(query=settings, key=settings, value=settings)
    coders = _coders_of(SpikingAttention(HeadShape(2, 8, 8), heads))
    assert all(coder.by_mean for coder in coders.values())


def test_firing_by_hand() -> None:
    """Four codes of two steps of at most 15; each moment a neuron fires or rests."""
    spikes = {"merged": 3, "stepped": 5, "binary": 50, "phase": 7}
    firing = Firing(4, 8, spikes, torch.zeros(4), spikes)
    assert work_of_firing("merged", firing, 15) == Work()
    assert work_of_firing("stepped", firing, 15) == Work(update=5, idle=3)
    assert work_of_firing("binary", firing, 15) == Work(update=50, idle=70)
    # 30 has 5 bits, so each has 5 moments
    assert work_of_firing("phase", firing, 15) == Work(update=7, idle=13)


def test_scaling_norms_softmax_and_rotary_by_hand() -> None:
    assert work_of_scaling(10, 2, baseline=True) == Work(multiply=60, add=30)
    assert work_of_scaling(10, 1, baseline=False) == Work(multiply=20)
    assert work_of_scaling(10, 1, baseline=False, coded=False) == Work(multiply=10)
    root_mean_square = work_of_norm(1, 8, centered=False, gain=True, bias=False)
    assert root_mean_square == Work(multiply=3 * 8 + 1, add=8, root=1)
    layer_norm = work_of_norm(2, 8, centered=True, gain=True, bias=True)
    assert layer_norm == Work(multiply=2 * (3 * 8 + 2), add=2 * (4 * 8 - 1), root=2)
    assert work_of_softmax(2, 5) == Work(multiply=20, compare=10, add=20, exp=10, divide=2)
    assert work_of_rotary(3, 4) == Work(multiply=24, add=12)


def test_layer_norms_are_told_from_others() -> None:
    counts = Counts(0)
    model = nn.Sequential(nn.LayerNorm(8, bias=False), nn.Linear(8, 8))
    handles = WorkCounter(lambda: counts).handles(model)
    model(torch.randn(5, 8))
    assert len(handles) == 1
    one = work_of_norm(5, 8, centered=True, gain=True, bias=False)
    assert counts.work == {"norms": dict.fromkeys((DENSE, *EXECUTION_MODES), one)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi", "gemma3"])
def test_norms_softmax_and_rotary_of_families(family: str) -> None:
    """What every form does too stands for the original and every mode alike."""
    model = build(family)
    counts = count_operations(model, [tokens()])["prefill"]
    assert set(counts.work) <= {"norms", "softmax", "rotary"}, "nothing is coded"
    for by_mode in counts.work.values():
        assert list(by_mode) == [DENSE, *EXECUTION_MODES]
        assert all(work == by_mode[DENSE] for work in by_mode.values())
    config = model.config
    blocks, heads = config.num_hidden_layers, config.num_attention_heads
    assert counts.work["softmax"][DENSE] == work_of_softmax(blocks * 2 * heads * 12, 12)
    assert ("rotary" in counts.work) == (family != "gpt2")
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    assert counts.work["norms"][DENSE]["root"] >= 24 * len(norms), "one a token, more for heads"
    if family == "llama":
        shared = config.num_key_value_heads
        expected = work_of_rotary(blocks * 24 * (heads + shared), config.head_dim)
        assert counts.work["rotary"][DENSE] == expected


def test_a_converted_model_by_hand(text_file: Path) -> None:
    model, tokenizer = first_blocks(dtype="float32")
    spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=4, seqlen=64)
    counts = count_operations(model, [tokens()])["prefill"]
    coded, merged, scaled, routed = Work(), Work(), Work(), 0
    for name, layer in spiking_linears(model).items():
        groups = len(set(layer.channel_group.tolist()))
        coder = coder_of(layer.neuron, groups, symmetric=False)  # type: ignore[arg-type]
        coded += work_of_coding(24 * layer.in_features, 24 * groups, coder)
        segments = len(layer.spec().segments)
        outputs = 24 * layer.out_features
        merged += work_of_scaling(outputs, segments, baseline=True)
        scaled += work_of_scaling(outputs, segments, baseline=False)
        routed += counts.firing[f"{name}.input"].spikes["binary"]
    assert counts.work["coding"] == dict.fromkeys(EXECUTION_MODES, coded)
    of_spikes = {mode: scaled for mode in EXECUTION_MODES if mode != "merged"}
    assert counts.work["scaling"] == {"merged": merged, **of_spikes}, "nothing fires at rest"
    assert set(counts.work["routing"]) == set(EXECUTION_MODES) - {"merged"}
    assert counts.work["routing"]["binary"] == Work(spike=routed)
    firing = counts.work["firing"]
    linear = counts.total("linear")
    assert firing["binary"] == Work(update=routed, idle=linear.slots * 15 - routed)
    assert firing["stepped"]["update"] == linear.spikes["stepped"]


def test_what_is_cached_is_coded_once(text_file: Path) -> None:
    """While decoding, Q, K and V of the new token alone are coded."""
    model, tokenizer = first_blocks(dtype="float32")
    recipe = "rtn-w4a4"
    attention = "attention={query: {bits: 4}, key: {bits: 4}, value: {bits: 4}}"
    spikellm.convert(
        model, tokenizer, recipe, str(text_file), samples=2, seqlen=64, settings=(attention,)
    )
    counts = count_operations(model, [tokens((1, 12))], decode=3)
    prefill, decode = (counts[part].work["coding"]["merged"] for part in ("prefill", "decode"))
    assert {key: 3 * value for key, value in decode.items()} == dict(prefill)
    scores = counts["prefill"].total("attention")
    assert scores.reached["binary"] == scores.sops["binary"]


@pytest.mark.parametrize("train", ["centered", "published"])
def test_products_of_heads_hold_the_baseline_as_their_trains_do(train: str) -> None:
    coded = {"bits": 4, "train": train}
    settings = AttentionRecipe.model_validate({"query": coded, "key": coded, "value": coded})
    coders = _coders_of(SpikingAttention(HeadShape(2, 8, 8), settings))
    assert set(coders) == {"query", "key", "value"}
    for coder in coders.values():
        assert coder.charges("merged")
        assert coder.charges("binary") == (train == "published")
