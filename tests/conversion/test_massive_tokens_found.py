"""Massive tokens through a whole conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.commands.inspect import _massive
from spikellm.nn.execution import set_execution_mode, spiking_linears
from spikellm.nn.rotation import layer_name
from spikellm.profiling.operations import count_operations
from spikellm.profiling.trace import trace_block

TOLD = ("activations.token_steps=8", "activations.token_factor=1.25", "activations.token_rate=0.05")


@pytest.fixture(scope="module", params=["rtn-w4a4", "best-w4a4"])
def model(request: pytest.FixtureRequest, text_file: Path) -> Any:
    model, tokenizer = first_blocks(1, dtype="float32")
    found = spikellm.convert(
        model, tokenizer, request.param, str(text_file), samples=4, seqlen=64, settings=TOLD
    )
    assert found.summary.average_steps == spikellm.summarize(model).average_steps
    return model


def test_thresholds_are_found_for_every_tensor(model: Any) -> None:
    layers = spiking_linears(model)
    thresholds = {
        layer_name(name).rpartition(".")[2]: float(layer.token_threshold)
        for name, layer in layers.items()
    }
    q, k, gate, up = (thresholds[f"{name}_proj"] for name in ("q", "k", "gate", "up"))
    assert q == k
    assert gate == up
    told = [layer.massive for layer in layers.values() if layer.massive is not None]
    assert told, "some tensor has tokens far from its median"
    assert all(0 < one.share <= 0.05 for one in told)
    assert 1 < spikellm.summarize(model).average_steps <= 1 + 7 * 0.05
    [line] = _massive([one.__dict__ for one in spikellm.summarize(model).layers])
    assert line.startswith("massive tokens take 8 steps in ")


def test_all_modes_agree_and_steps_are_counted(model: Any, tokens: torch.Tensor) -> None:
    outputs = []
    for mode in ("stepped", "binary", "merged"):
        set_execution_mode(model, mode)
        with torch.no_grad():
            outputs.append(model(tokens).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    linear = count_operations(model, [tokens])["prefill"].total("linear")
    seen: dict[str, float] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, fed, name=name: seen.update(
                {name: float(layer.steps_of(fed[0]).float().mean())}
            )
        )
        for name, layer in spiking_linears(model).items()
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    macs = {
        name: layer.in_features * layer.out_features
        for name, layer in spiking_linears(model).items()
    }
    expected = sum(seen[name] * macs[name] for name in macs) / sum(macs.values())
    assert linear.average_steps == pytest.approx(expected, rel=1e-5)
    assert linear.ace == pytest.approx(16 * linear.macs * expected, rel=1e-5)
    assert expected > 1


def test_a_block_is_traced(model: Any, tokens: torch.Tensor) -> None:
    found = trace_block(model, tokens[:1], 0)
    assert found.equal
    assert {one.moments for one in found.traces} <= {15, 120}


def test_it_reloads(model: Any, tokenizer: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = spikellm.save(model, tokenizer, tmp_path / "saved")
    again, _ = spikellm.load(folder)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    before, after = (
        {name: layer.massive for name, layer in spiking_linears(one).items()}
        for one in (model, again)
    )
    assert before == after
