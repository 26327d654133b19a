"""Fitting runs only what changed of a block, and gives the bytes of running all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spikellm
from budget import mostly_slow
from conftest import first_blocks
from families import FAMILIES, build
from spikellm.algorithms import compensation
from spikellm.nn.execution import spiking_linears
from spikellm.nn.linear import SpikingLinear

RECIPE = "best-w4a4"


def converted(model: Any, tokenizer: Any, text_file: Path) -> dict[str, torch.Tensor]:
    spikellm.convert(model, tokenizer, RECIPE, str(text_file), samples=3, seqlen=24)
    return dict(model.state_dict())


@pytest.mark.parametrize("family", mostly_slow(sorted(FAMILIES), {"llama", "gpt_neox", "phi3"}))
@pytest.mark.parametrize("room", [0, 20_000])
def test_bytes_stay(
    family: str, room: int, tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = converted(build(family), tokenizer, text_file)
    monkeypatch.setattr(compensation, "KEPT", room)
    again = converted(build(family), tokenizer, text_file)
    assert kept.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_every_layer_runs_once_on_every_batch(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = Counter[nn.Module](), SpikingLinear.forward

    def forward(self: SpikingLinear, x: torch.Tensor) -> torch.Tensor:
        calls[self] += 1
        return real(self, x)

    monkeypatch.setattr(SpikingLinear, "forward", forward)
    model, tokenizer = first_blocks()
    spikellm.convert(model, tokenizer, RECIPE, str(text_file), samples=40, seqlen=64)
    layers = spiking_linears(model).values()
    assert [calls[layer] for layer in layers] == [2] * len(layers)  # batches of 2,048 tokens
