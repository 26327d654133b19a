from __future__ import annotations

from typing import Any

import pytest
import torch

import spikellm
from conftest import SHARED, needs_shared
from spikellm.core.errors import NumericalError, RequestError


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_named_not_decoded(
    bundled: tuple[Any, Any], temperature: float
) -> None:
    model, tokenizer = bundled
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinity on this prompt"):
        spikellm.generate(model, tokenizer, "Return", max_new_tokens=2, temperature=temperature)


def test_a_temperature_next_to_zero_is_refused(bundled: tuple[Any, Any]) -> None:
    with pytest.raises(RequestError, match="temperature is 1e-320"):
        spikellm.generate(*bundled, "Return", temperature=1e-320)


def test_nothing_is_dropped_out_and_the_mode_stays(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    expected = spikellm.generate(model, tokenizer, "Return a list", max_new_tokens=8)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()
    assert spikellm.generate(model, tokenizer, "Return a list", max_new_tokens=8) == expected
    assert model.training
    assert not model.model.layers[0].training


@needs_shared
def test_the_tokenizer_of_another_model_is_refused(bundled: tuple[Any, Any]) -> None:
    _, other = spikellm.load(SHARED / "models" / "llama-wt2-8m")
    with pytest.raises(RequestError, match=r"gives token \d+ and the model knows 2048"):
        spikellm.generate(
            bundled[0], other, "Extraordinarily unusual circumstances", max_new_tokens=2
        )
