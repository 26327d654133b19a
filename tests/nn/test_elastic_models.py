"""Models of elastic neurons and of thresholds from means: every mode, saved and reloaded."""

from __future__ import annotations

from pathlib import Path

import torch

import spikellm
from conftest import first_blocks
from spikellm.models.cache import spiking_cache
from spikellm.nn.execution import spiking_linears

_HEAD = "{bits: 2, neuron: ternary, symmetric: true, threshold_from: mean}"
_INPUT = "bits: 2, neuron: elastic, symmetric: true, steps: 3, threshold_from: mean"


def test_a_converted_model(text_file: Path, tmp_path: Path) -> None:
    model, tokenizer = first_blocks(dtype="float32")
    settings = (
        f"activations={{{_INPUT}, search_range: true}}",
        f"attention={{query: {_HEAD}, key: {_HEAD}, value: {_HEAD}}}",
        "untrained=true",
    )
    spikellm.convert(
        model, tokenizer, "w8a8", str(text_file), samples=4, seqlen=64, settings=settings
    )
    factors = {layer.range_share for layer in spiking_linears(model).values()}
    assert len(factors) > 1, "each tensor has a factor of its own"
    tokens = torch.randint(2, 2000, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = model(tokens, use_cache=False).logits
        for mode in ("stepped", "binary", "phase"):
            spikellm.set_execution_mode(model, mode)
            assert torch.equal(model(tokens, use_cache=False).logits, merged), mode
        spikellm.set_execution_mode(model, "merged")
        spikellm.save(model, tokenizer, tmp_path / "saved")
        again, _ = spikellm.load(str(tmp_path / "saved"))
        assert torch.equal(again(tokens, use_cache=False).logits, merged)
        cached = model(tokens, use_cache=True, past_key_values=spiking_cache(model)).logits
    torch.testing.assert_close(cached, merged, rtol=1e-4, atol=1e-4)
