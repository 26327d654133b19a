"""A neuron that encodes in a way of its own runs as it says, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from layers import fit
from native import both, needs_compiler
from spikellm.kernels import reasons, select
from spikellm.kernels.coding import InputCoding
from spikellm.neurons import SoftResetNeuron, neurons
from spikellm.neurons.base import Steps
from spikellm.nn.fake_quant import InputCoder
from spikellm.nn.head_codec import HeadCoder
from spikellm.nn.linear import SpikingLinear
from spikellm.quantization.thresholds import coded_range
from spikellm.recipe import ActivationRecipe, LinearRecipe

ELASTIC = {"bits": 2, "neuron": "elastic", "symmetric": True}


@dataclass(frozen=True)
class EvenNeuron(SoftResetNeuron):
    """Fires pairs of spikes only: an odd count loses one."""

    def encode(self, current: Tensor, theta: Tensor, baseline: Tensor, steps: Steps = 1) -> Tensor:
        return super().encode(current, theta, baseline, steps) // 2 * 2


@pytest.fixture
def even() -> Iterator[str]:
    neurons.register("even")(lambda bits: EvenNeuron(levels=2**bits - 1))
    yield "even"
    del neurons._entries["even"]


def layer_of(neuron: str) -> SpikingLinear:
    dense = nn.Linear(20, 6)
    nn.init.normal_(dense.weight, generator=torch.Generator().manual_seed(0))
    activations = ActivationRecipe(bits=4, neuron=neuron)
    return fit(dense, LinearRecipe(weights={"bits": 4}, activations=activations))


@needs_compiler
def test_native_refuses_it(even: str) -> None:
    layer, group = layer_of(even), torch.zeros(2, 10, dtype=torch.uint8)
    coder = HeadCoder(ActivationRecipe(bits=4, neuron=even), group)
    for spec in (layer.spec(), coder.spec):
        assert reasons(spec, "cpu")["native"] == "its neuron encodes in a way of its own"
    published = ActivationRecipe(bits=4, neuron="gif-published", steps=2)
    spec = fit(nn.Linear(20, 6), LinearRecipe(activations=published)).spec()
    assert select(spec, "cpu").name == "native", "another top code is no other way"


@needs_compiler
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("source", ["range", "mean"])
def test_native_looks_levels_up(steps: int, source: str) -> None:
    settings = ActivationRecipe.model_validate(
        {**ELASTIC, "steps": steps, "threshold_from": source}
    )
    dense, x = nn.Linear(70, 6), torch.randn(9, 70)
    layer = fit(dense, LinearRecipe(weights={"bits": 4}, activations=settings))
    found, expected = both(layer, x)
    assert torch.equal(found, expected)
    edges = layer.neuron.levels_of(steps).edges  # type: ignore[union-attr]
    x = torch.cat([edges, -edges, edges.nextafter(torch.zeros(1)), torch.full((1,), steps)])
    layer = fit(nn.Linear(len(x), 1), LinearRecipe(weights={"bits": 4}, activations=settings))
    found, expected = both(layer, x.unsqueeze(0))
    assert torch.equal(found, expected), "ties too"
    coder = HeadCoder(settings, torch.zeros(2, 10, dtype=torch.uint8))
    heads = torch.randn(1, 2, 5, 10)
    assert select(coder.spec, "cpu").name == "native"
    assert torch.equal(coder.to_rows(heads), coder.reference.to_rows(heads))
    assert torch.equal(coder.fake_quantize(heads), coder.reference.fake_quantize(heads))


@pytest.mark.usefixtures("native_kernels")
@needs_compiler
@pytest.mark.parametrize("neuron", ["ternary", "elastic"])
@pytest.mark.parametrize("source", ["range", "mean"])
def test_gradients_of_trained_layers(
    neuron: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ActivationRecipe.model_validate(
        {**ELASTIC, "neuron": neuron, "steps": 3, "threshold_from": source}
    )
    layer = fit(nn.Linear(40, 6), LinearRecipe(weights={"bits": 4}, activations=settings))
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(7, 40, generator=generator) for _ in range(2))
    share = torch.tensor([0.7 if source == "range" else 2.1])
    coding = InputCoding(layer.spec())
    monkeypatch.setenv("SPIKELLM_KERNELS", "torch")
    reference = InputCoding(layer.spec())
    assert coding._plan is not None
    assert reference._plan is None
    found, expected = (one.gradients(x, gradient, share) for one in (coding, reference))
    assert torch.equal(found.inputs, expected.inputs)
    torch.testing.assert_close(found.shares, expected.shares)
    values = [one.values(x, share, torch.float32) for one in (coding, reference)]
    assert torch.equal(*values)
    beyond = x.abs() > coded_range(x, float(share), settings.threshold_from)[1]
    if source == "range":
        beyond = x.abs() > x.abs().amax(1, keepdim=True) * share
    assert bool(beyond.any())
    stopped = beyond if neuron == "elastic" else torch.zeros_like(beyond)
    assert torch.equal(found.inputs, gradient * ~stopped)


def test_native_has_one_table_of_levels() -> None:
    several = ActivationRecipe.model_validate({**ELASTIC, "salient_rate": 0.2, "salient_steps": 2})
    layer = SpikingLinear(20, 6, LinearRecipe(activations=several))
    assert "other levels for each of 2" in str(reasons(layer.spec(), "cpu")["native"])
    published = ActivationRecipe.model_validate({**ELASTIC, "neuron": "elastic-published"})
    layer = SpikingLinear(20, 6, LinearRecipe(activations=published))
    assert reasons(layer.spec(), "cpu")["native"] == "its neuron encodes in a way of its own"


def test_every_path_gives_its_codes(even: str) -> None:
    layer, x = layer_of(even), torch.randn(5, 20)
    codes, _ = layer.encode(x)
    assert not (codes % 2).any()
    merged = layer(x)
    assert not torch.equal(merged, layer_of("gif")(x))
    layer.execution_mode = "binary"
    assert torch.equal(layer(x), merged)
    heads = torch.randn(1, 2, 5, 10)
    coder = HeadCoder(ActivationRecipe(bits=4, neuron=even), torch.zeros(2, 10, dtype=torch.uint8))
    expected = coder.decode(coder.encode(heads))
    assert torch.equal(coder.fake_quantize(heads), expected)
    assert torch.equal(coder.decode(coder.unpack(coder.to_rows(heads), 10)), expected)


def test_training_sees_its_values(even: str) -> None:
    layer, x = layer_of(even), torch.randn(5, 20)
    found = InputCoder(layer.settings.activations, layer.channel_group).values(x)
    codes, [(theta, baseline)] = layer.encode(x)
    assert torch.equal(found, theta * (codes - baseline))
