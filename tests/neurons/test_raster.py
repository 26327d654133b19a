from __future__ import annotations

from typing import Any

import pytest
import torch

from spikellm.neurons import make_neuron, spike_raster, with_train
from spikellm.quantization.thresholds import threshold_for_range, token_range


@pytest.mark.parametrize(
    ("name", "bits", "steps"), [("gif", 2, 3), ("if", 1, 5), ("ternary", 2, 4)]
)
@pytest.mark.parametrize("drive", ["drain", "constant"])
def test_raster_decodes_to_the_tensor(name: str, bits: int, steps: int, drive: str) -> None:
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(1))
    neuron = make_neuron(name, bits)
    theta, baseline = threshold_for_range(
        *token_range(x), neuron.levels * steps, signed=neuron.signed
    )
    binary = spike_raster(x, neuron, steps, drive=drive)
    stepped = spike_raster(x, neuron, steps, execution="stepped", drive=drive)
    assert binary.shape == (steps * neuron.levels, 4, 33)
    assert set(binary.unique().tolist()) <= ({-1, 0, 1} if neuron.signed else {0, 1})
    assert torch.equal(binary.sum(0), stepped.sum(0))
    assert float((neuron.decode(binary.sum(0), theta, baseline) - x).abs().max()) <= float(
        theta.max()
    ) * (1.01 if not neuron.signed else 0.51)


def test_steps_by_channel() -> None:
    x = torch.tensor([[-1.0, 0.5, 1.0]])
    raster = spike_raster(x, make_neuron("gif", 1), torch.tensor([1, 2, 4]))
    assert raster.shape == (4, 1, 3)
    assert int(raster[1:, 0, 0].sum()) == 0, "a channel of one step is silent afterwards"
    assert int(raster[:, 0, 2].sum()) == 4


@pytest.mark.parametrize("train", ["centered", "published"])
def test_phases_say_what_binary_spikes_say(train: Any) -> None:
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(1))
    neuron = with_train(make_neuron("gif", 2), train, "signed-digit")
    binary, phase = (spike_raster(x, neuron, 3, execution=form) for form in ("binary", "phase"))
    worth = 2 ** torch.arange(len(phase)).flip(0)
    assert torch.equal((phase * worth[:, None, None]).sum(0), binary.sum(0))
    assert bool((binary < 0).any()) == (train == "centered")
    with pytest.raises(ValueError, match="at the start"):
        spike_raster(x, neuron, 3, execution="phase", drive="constant")


def test_unknown_execution_is_refused() -> None:
    with pytest.raises(ValueError, match="valid: stepped, binary, phase"):
        spike_raster(torch.ones(1, 2), make_neuron("gif", 1), execution="merged")  # type: ignore[arg-type]
