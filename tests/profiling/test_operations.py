from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import spikellm
from conftest import first_blocks
from families import build
from spikellm.neurons import make_neuron, with_train
from spikellm.nn.execution import spiking_linears
from spikellm.nn.formats.ternary import TernaryFormat
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.before_coding import operations_of_mix
from spikellm.profiling.counts import EXECUTION_MODES
from spikellm.profiling.firing import count_spikes
from spikellm.profiling.operations import (
    OperationCounter,
    count_operations,
)


def converted(recipe: str, text_file: Path, *settings: str) -> Any:
    model, tokenizer = first_blocks(dtype="float32")
    spikellm.convert(
        model, tokenizer, recipe, str(text_file), samples=4, seqlen=64, settings=settings
    )
    return model


def tokens(shape: tuple[int, int] = (2, 12)) -> torch.Tensor:
    return torch.randint(2, 2000, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "bits"), [("if", 1), ("gif", 2), ("gif", 4), ("ternary", 2)])
@pytest.mark.parametrize("train", ["centered", "published"])
@pytest.mark.parametrize("recoding", ["binary", "signed-digit"])
@pytest.mark.parametrize("rows", [5, 500])
def test_spikes_of_every_form_are_those_of_the_trains(
    name: str, bits: int, train: Any, recoding: Any, rows: int
) -> None:
    """Against the trains themselves, step by step."""
    neuron = with_train(make_neuron(name, bits), train, recoding)
    steps = torch.tensor([1, 2, 4, 1])
    low = -neuron.top(steps) if neuron.both_signs else torch.zeros_like(steps)
    count = (
        low
        + torch.rand(rows, 4, generator=torch.Generator().manual_seed(0))
        * (neuron.top(steps) - low + 1)
    ).int()
    found = count_spikes(count, neuron.levels, recoding)
    assert torch.equal(found["merged"], (count != 0).sum(0))
    assert torch.equal(found["stepped"], (neuron.stepped(count, steps) != 0).sum((0, 1)))
    assert torch.equal(found["binary"], (neuron.binary(count, steps) != 0).sum((0, 1)))
    assert torch.equal(found["phase"], (neuron.phase(count, steps) != 0).sum((0, 1)))
    assert all(
        torch.equal(one, torch.zeros(3))
        for one in count_spikes(
            torch.zeros(4, 3, dtype=torch.int32), neuron.levels, recoding
        ).values()
    )


@pytest.mark.parametrize("train", ["centered", "published"])
def test_a_spiking_layer_against_loops(train: str, text_file: Path) -> None:
    """Every number of one layer, from its inputs, one token, channel and step after the other."""
    model = converted("w4a4-t2", text_file, f"train={train}")
    name, layer = next(iter(spiking_linears(model).items()))
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    counts = count_operations(model, [tokens()])["prefill"]
    handle.remove()
    neuron = layer.neuron
    assert neuron is not None
    codes, thresholds = layer.encode(inputs[0].reshape(-1, layer.in_features))
    bounds = layer.layout().bounds
    rest = torch.cat(
        [
            z.int().expand(len(codes), stop - start)
            for (_, z), (start, stop) in zip(thresholds, pairwise(bounds), strict=True)
        ],
        1,
    )
    sizes = (codes - rest).abs() if train == "centered" else codes
    steps = layer.stored(layer.channel_steps).long()
    some = (layer.integer_weights() != 0).sum(0).tolist()
    assert min(some) < layer.out_features, "some weights are zero"
    spikes, sops, from_zero, sops_from_zero = (dict.fromkeys(EXECUTION_MODES, 0) for _ in range(4))
    slots = macs = ace = 0
    for own, sums, reached in ((sizes, spikes, sops), (codes, from_zero, sops_from_zero)):
        for row in own.tolist():
            for one, synapses in zip(row, some, strict=True):
                stepped = -(-one // neuron.levels)
                for mode, fired in zip(
                    EXECUTION_MODES, (int(one > 0), stepped, one, one.bit_count()), strict=True
                ):
                    sums[mode] += fired
                    reached[mode] += fired * synapses
    for row in sizes.tolist():
        for code, horizon in zip(row, steps.tolist(), strict=True):
            macs += layer.out_features
            ace += horizon * 4 * 4 * layer.out_features
            slots += horizon
            stepped_levels = [
                min(max(code - step * neuron.levels, 0), neuron.levels) for step in range(horizon)
            ]
            assert sum(stepped_levels) == code
    reached = {mode: fired * layer.out_features for mode, fired in spikes.items()}
    found = counts.layers[name]
    assert (found.macs, found.slots, dict(found.spikes), dict(found.sops)) == (
        macs,
        slots,
        spikes,
        sops,
    )
    assert dict(found.reached) == reached
    assert found.weight_density == sops["merged"] / reached["merged"]
    assert found.operands == layer.in_features * layer.out_features
    assert found.ace == pytest.approx(ace, rel=1e-6)
    assert found.spike_rate == spikes["stepped"] / slots
    firing = counts.firing[f"{name}.input"]
    assert dict(found.spikes_from_zero) == from_zero
    assert dict(found.sops_from_zero) == sops_from_zero
    accumulators = len(codes) * layer.out_features
    tops = [int(steps[part.start]) * neuron.levels for part in layer.spec().segments]
    assert found.shifts == accumulators * sum(top.bit_length() - 1 for top in tops)
    assert found.codes == codes.numel()
    assert (spikes["binary"] < from_zero["binary"]) == (train == "centered")
    rates = sizes.sum(0) / (steps * neuron.levels * len(codes))
    torch.testing.assert_close(firing.rates, rates.float())
    assert found.additive_share == 0


def test_steps_multiply_the_effort_and_forms_order_the_operations(text_file: Path) -> None:
    model, one = (
        converted("w4a4-t2", text_file),
        converted("w4a4-t2", text_file, "activations={bits: 4}"),
    )
    two, single = (count_operations(m, [tokens()])["prefill"].total("linear") for m in (model, one))
    assert two.ace / single.ace == pytest.approx(1.10, abs=0.005)
    assert two.average_steps == pytest.approx(spikellm.summarize(model).average_steps, abs=1e-6)
    assert single.ace == single.macs * 16
    assert two.sops["merged"] <= two.sops["stepped"] <= two.sops["binary"]
    assert two.sops["merged"] > 0


def test_ternary_weights_are_the_spikes_where_inputs_are_not_coded(text_file: Path) -> None:
    model = converted("ternary-1.4", text_file)
    counts = count_operations(model, [tokens()])["prefill"]
    for name, layer in spiking_linears(model).items():
        assert isinstance(layer.format, TernaryFormat)
        fired = sum(int(plane.sum()) for pair in layer.format.planes(layer) for plane in pair)
        found = counts.layers[name]
        assert found.sops["stepped"] == found.sops["binary"] == found.sops["phase"] == 24 * fired
        assert found.sops["merged"] == 24 * int((layer.integer_weights() != 0).sum())
        assert set(found.by_bits) == {(16, 2)}
    assert counts.total("linear").additive_share == 1.0
    assert counts.total().additive_share < 1
    model = converted("pbllm-90", text_file)
    counts = count_operations(model, [tokens()])["prefill"]
    for name, layer in spiking_linears(model).items():
        assert counts.layers[name].average_steps == pytest.approx(layer.average_steps)
    partly = counts.total("linear")
    assert (
        partly.average_steps
        == pytest.approx(spikellm.summarize(model).average_steps)
        == pytest.approx(1.7, abs=0.005)
    )
    assert partly.additive_share == pytest.approx(0.9, abs=0.001)
    assert partly.by_bits[16, 8] / partly.executed == pytest.approx(0.1, abs=0.001)
    assert partly.by_bits[16, 1] + partly.by_bits[16, 8] == pytest.approx(
        partly.macs, abs=len(spiking_linears(model))
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi", "bloom"])
def test_products_are_those_that_torch_counts(family: str) -> None:
    model = build(family)
    if family != "bloom":
        model.set_attn_implementation(
            "eager"
        )  # torch counts no flops of its fused attention on CPUs
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(tokens(), use_cache=False)
    found = count_operations(model, [tokens()])["prefill"]
    if (
        family != "bloom"
    ):  # computes attention by itself, and torch counts products of positions too
        assert 2 * found.total().macs == flops.get_total_flops()
    assert found.tokens == 24
    assert found.total().additive_share == found.total().spike_rate == 0


def test_the_model_is_not_changed_and_outputs_are_the_same(text_file: Path) -> None:
    model = converted("spike-w4a4-t2", text_file, "algorithm.epochs=1")
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        with OperationCounter(model) as counter:
            assert torch.equal(model(tokens(), use_cache=False).logits, expected)
        assert torch.equal(model(tokens(), use_cache=False).logits, expected)
    assert counter.take().tokens == 24
    assert counter.take().tokens == 0
    assert model.config._attn_implementation == before
    dense = build("llama")
    before = dense.config._attn_implementation
    with pytest.raises(ZeroDivisionError), OperationCounter(dense):
        raise ZeroDivisionError
    assert dense.config._attn_implementation == before
    assert not any(module._forward_hooks for module in dense.modules())


def test_attention_and_head_are_named_and_decoding_is_apart(text_file: Path) -> None:
    model = converted("spike-w4a4-t2", text_file, "algorithm.epochs=1")
    found = count_operations(model, [tokens((1, 12))], decode=3)
    config = model.config
    pairs = {"prefill": 9 * 9, "decode": 10 + 11 + 12}
    for phase, counts in found.items():
        scores = counts.layers["model.layers.0.self_attn scores"]
        assert scores.macs == pairs[phase] * config.num_attention_heads * config.head_dim
        assert counts.kinds["lm_head"] == "head"
        assert counts.tokens == {"prefill": 9, "decode": 3}[phase]
        steps = 1 + float((model.model.layers[0].self_attn.spikes.key_group > 0).float().mean())
        assert scores.ace == pytest.approx(scores.macs * steps * 16, rel=1e-3)
        values = counts.layers["model.layers.0.self_attn values"]
        assert set(values.by_bits) == {(16, 4)}
        assert values.sops["binary"] >= values.sops["stepped"] >= values.sops["merged"] > 0
        assert counts.total("linear", "attention", "head").macs == counts.total().macs


def test_attention_against_loops(text_file: Path) -> None:
    """Query spikes reach every key, value spikes every query of the heads that share them."""
    model = converted("spike-w4a4-t2", text_file, "algorithm.epochs=1")
    from spikellm.nn.hooks import SpikeTrain, observe_spikes

    seen: dict[tuple[torch.nn.Module, str], SpikeTrain] = {}
    with (
        torch.no_grad(),
        observe_spikes(lambda train: seen.setdefault((train.source, train.part), train) and None),
    ):
        model(tokens((1, 6)), use_cache=False)
    counts = count_operations(model, [tokens((1, 6))])["prefill"]
    attention = model.model.layers[1].self_attn
    query, value = (seen[attention.spikes, part] for part in ("query", "value"))
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    assert (
        counts.layers["model.layers.1.self_attn scores"].sops["binary"]
        == int(query.fired.abs().sum()) * 6
    )
    assert (
        counts.layers["model.layers.1.self_attn values"].sops["binary"]
        == int(value.fired.abs().sum()) * 6 * group
    )
    assert isinstance(next(iter(spiking_linears(model).values())), SpikingLinear)


def test_rotations_are_counted_by_hand() -> None:
    found = operations_of_mix(12, 5)  # 8 channels twice, three passes of 8 additions each
    assert found.by_bits == {(16, 1): 5 * 2 * 3 * 8}
    assert found.additions == found.executed
    assert found.macs == 0
    assert operations_of_mix(4096, 1).executed == 4096 * 12
