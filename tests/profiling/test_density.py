"""Zeros in weights: no synaptic operation, and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.models.summary import summarize
from spikellm.nn.execution import spiking_linears
from spikellm.profiling.operations import count_operations
from spikellm.profiling.report_data import operations_data


@pytest.mark.parametrize("recipe", ["sparse-50-w4a4", "ternary-1.0"])
def test_synaptic_operations_are_spikes_times_density(recipe: str, text_file: Path) -> None:
    model, tokenizer = first_blocks(1)
    settings = ["activations.bits=4", "algorithm={name: gptq, sparsity: 0.6}"]
    spikellm.convert(
        model, tokenizer, recipe, str(text_file), settings=settings, samples=2, seqlen=32
    )
    tokens = torch.randint(2, 2000, (1, 16), generator=torch.Generator().manual_seed(0))
    counts = count_operations(model, [tokens])["prefill"]
    linear, summary = counts.total("linear"), summarize(model, density=True)
    assert summarize(model).weight_density is None, "only where it is asked for"
    assert summary.weight_density is not None
    assert 0.3 < summary.weight_density <= 0.4
    for layer in summary.layers:
        if layer.weight_density is None:
            continue
        weights = spiking_linears(model)[layer.name].integer_weights()
        assert layer.weight_density == float((weights != 0).double().mean())
    assert linear.sops["binary"] < 0.5 * linear.reached["binary"]
    data = operations_data(linear)
    product = data["density"]["spikes"]["merged"] * data["density"]["weights"]
    assert data["density"]["product"]["merged"] == pytest.approx(product)
    assert 0 < data["sparse_rate"] < 0.5 * data["spike_rate"]
