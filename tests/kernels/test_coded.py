"""What a tensor was coded to serves the next layer that reads it, and nothing else does."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layers import fit
from native import needs_compiler
from spikellm.kernels.native import build
from spikellm.kernels.native.coded import last_coded
from spikellm.kernels.prepared import by_column
from spikellm.nn.hooks import SpikeTrain, observe_spikes
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.firing import LastFired
from spikellm.recipe import ActivationRecipe, LinearRecipe

pytestmark = [pytest.mark.usefixtures("native_kernels"), needs_compiler]
TAKEN = 12  # place of the argument that says so


def layer_of(outputs: int, bits: int = 4, weights: int = 4) -> SpikingLinear:
    chosen = {"salient_rate": 0.2, "salient_steps": 2, "saliency": "rms"}
    recipe = LinearRecipe(
        weights={"bits": weights},
        activations=ActivationRecipe.model_validate({"bits": bits, **chosen}),
    )
    sample = torch.randn(30, 90, generator=torch.Generator().manual_seed(0))
    return fit(nn.Linear(90, outputs), recipe, sample=sample)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What calls of the library say about who coded."""
    found, library = list[int](), build.load_library()

    def linear(*arguments: Any) -> int:
        if arguments[TAKEN - 1] is not None:  # memory that is left for others
            found.append(arguments[TAKEN])
        return int(library.spikellm_spike_linear(*arguments))

    watched = SimpleNamespace(
        spikellm_spike_linear=linear,
        spikellm_coded_bytes=library.spikellm_coded_bytes,
        spikellm_column_sums=library.spikellm_column_sums,
    )
    monkeypatch.setattr("spikellm.kernels.native.backend.build.load_library", lambda: watched)
    return found


def alone(layer: SpikingLinear, x: Tensor) -> Tensor:
    return layer(x.clone())  # a tensor that nobody has seen


@pytest.mark.parametrize("tokens", [16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_one_tensor_code_it_once(
    tokens: int, dtype: torch.dtype, taken: list[int]
) -> None:
    layers, x = [layer_of(rows) for rows in (33, 7, 64)], torch.randn(2, tokens // 2, 90).to(dtype)
    expected = [alone(layer, x) for layer in layers]
    assert taken == [0, 0, 0]
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert taken[3:] == [0, 1, 1]


def test_a_write_another_coding_and_another_tensor_are_seen(taken: list[int]) -> None:
    first, second, x = layer_of(8), layer_of(8), torch.randn(20, 90)
    first(x)
    x[3, 5] += 9
    assert torch.equal(second(x), alone(second, x))
    for other in (layer_of(8, bits=3), layer_of(8, weights=3)):
        first(x)
        assert torch.equal(other(x), alone(other, x))
    first(x)
    assert torch.equal(second(x[:18]), alone(second, x[:18]))
    assert 1 not in taken
    first(x)
    second(x)
    assert taken[-2:] == [0, 1]
    with torch.inference_mode():  # writes are not counted there
        y = torch.randn(20, 90)
        first(y)
        y.mul_(2)
        assert torch.equal(second(y), alone(second, y))


def test_one_layer_alone_never_takes_what_it_left(taken: list[int]) -> None:
    """Buffers that are filled anew in ways that torch does not count."""
    layer, buffer = layer_of(8), np.random.default_rng(0).normal(size=(20, 90)).astype(np.float32)
    x = torch.from_numpy(buffer)
    layer(x)
    buffer[:] = 3 * buffer[::-1]
    assert torch.equal(layer(x), alone(layer, x))
    y = torch.randn(20, 90)
    for data in (2 * y, torch.randn(40, 90), torch.randn(40, 90).bfloat16()):
        layer(y)
        y.data = data
        assert torch.equal(layer(y), alone(layer, y))
    assert 1 not in taken


def test_other_layers_see_other_data(taken: list[int]) -> None:
    first, second, y = layer_of(8), layer_of(8), torch.randn(20, 90)
    first(y)
    y.data = torch.randn(40, 90)
    assert torch.equal(second(y), alone(second, y))
    assert 1 not in taken


def test_memory_is_the_processors(taken: list[int]) -> None:
    layer, x = layer_of(8), torch.randn(20, 90)
    expected = alone(layer, x)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


def test_nor_what_another_left_after_it(taken: list[int]) -> None:
    """The second is observed, so it codes anew; the first has had that tensor all the same."""
    first, second = layer_of(8), layer_of(8)
    buffer = np.random.default_rng(0).normal(size=(20, 90)).astype(np.float32)
    x = torch.from_numpy(buffer)
    first(x)
    with observe_spikes(lambda train: None):
        second(x)
    buffer[:] = 3 * buffer[::-1]
    assert torch.equal(first(x), alone(first, x))
    assert 1 not in taken


def test_it_goes_with_the_tensor_and_stays_in_its_thread(taken: list[int]) -> None:
    layer, x = layer_of(8), torch.randn(20, 90)
    kernels = layer._prepare().chosen
    layer(x)
    coding = kernels.coding  # type: ignore[attr-defined]
    other = threading.Thread(target=layer_of(8), args=(x,))
    other.start()
    other.join()
    assert taken == [0, 0]
    assert last_coded.of(x, coding, "another layer") is not None
    assert last_coded.of(x, coding, "another layer") is None, "which had it"
    kept = last_coded._kept
    del x
    assert kept is not None
    assert kept.coded is None


@pytest.mark.parametrize("bits", [4, 1])
def test_who_observes_is_shown_the_same_codes_by_all(bits: int, taken: list[int]) -> None:
    layers, x = [layer_of(rows, bits) for rows in (33, 7)], torch.randn(20, 90)
    expected, trains = [alone(layer, x) for layer in layers], list[SpikeTrain]()
    taken.clear()
    layer_of(5, bits)(x)  # what nobody observed is coded again
    with observe_spikes(trains.append):
        found = [layer(x) for layer in layers]
        layers[1](x.clone())
    assert taken == [0, 0, 1, 0]
    assert all(map(torch.equal, found, expected))
    first, second, apart = trains
    assert first.shown is second.shown
    assert first.shown_baseline is second.shown_baseline
    for train in (second, apart):
        codes, thresholds = layers[1].encode(x)
        assert torch.equal(train.codes, codes)
        z = by_column([z.flatten() for _, z in thresholds], layers[1].spec().bounds)
        assert torch.equal(train.baseline.expand_as(codes), z.int().expand_as(codes))


def test_a_train_that_layers_share_is_counted_once() -> None:
    layers, x = [layer_of(rows) for rows in (33, 7)], torch.randn(20, 90)
    trains, fired = list[SpikeTrain](), LastFired()
    with observe_spikes(trains.append):
        for layer in layers:
            layer(x)
        layers[0](x.clone())
    one, other, apart = map(fired.of, trains)
    assert one is other
    assert apart is not one
    assert torch.equal(apart.spikes, one.spikes)
    assert apart.firing.spikes == one.firing.spikes
    more = trains[0]._replace(steps=trains[0].steps + 1)
    assert fired.of(trains[0]).firing.slots < fired.of(more).firing.slots
