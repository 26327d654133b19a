"""Offloading weights: memory is given back, no value changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import spikellm
from conftest import BUNDLED
from spikellm.core.offload import offload, release, released_after_forward

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="advice of Linux")
MIB = 1 << 20


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's mapping that are in memory."""
    address, inside, size = tensor.data_ptr(), False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and ":" not in head:
            start, stop = (int(bound, 16) for bound in head.split("-"))
            inside = start < address + tensor.nbytes and stop > address
        elif inside and head == "Rss:":
            size += int(line.split()[1]) * 1024
    return size


def test_mapped_tensors_leave_memory_and_come_back(tmp_path: Path) -> None:
    expected = torch.randint(0, 256, (16 * MIB,), dtype=torch.uint8)
    save_file({"a": expected}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        tensor = file.get_tensor("a")
    assert torch.equal(tensor, expected)
    assert resident(tensor) >= 15 * MIB
    offload(tensor)
    assert resident(tensor) < 2 * MIB
    assert torch.equal(tensor, expected)


def test_what_was_written_to_stays(tmp_path: Path) -> None:
    """Pages of a private mapping that were changed have no file behind them any more."""
    save_file({"a": torch.zeros(4 * MIB, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        tensor = file.get_tensor("a")
    tensor += 7
    offload(tensor)
    assert (tensor == 7).all()


def test_tensors_without_a_file_are_left_alone() -> None:
    layer = nn.Linear(2048, 1024)
    before = layer.weight.detach().clone()
    release(layer)
    assert resident(layer.weight) >= layer.weight.nbytes
    assert torch.equal(layer.weight, before)


def test_memory_from_elsewhere_keeps_its_values() -> None:
    """What looks like a mapped file and is none is at most swapped out."""
    tensor = torch.from_numpy(np.full(2 * MIB, 7, dtype=np.uint8))
    offload(tensor)
    assert (tensor == 7).all()


def test_a_loaded_model_is_mapped_from_its_shards() -> None:
    """What this rests on: the model library leaves weights where safetensors maps them."""
    model, _ = spikellm.load(BUNDLED)
    assert not any(weight.untyped_storage().resizable() for weight in model.parameters())


def test_modules_are_offloaded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr("spikellm.core.offload.release", seen.append)
    layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    with released_after_forward(layers):
        layers[1](layers[0](torch.ones(1, 3)))
    assert seen == list(layers)
    layers[0](torch.ones(1, 3))
    assert len(seen) == 2
