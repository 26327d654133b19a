"""Blocks on another device while they are converted.

There is one device here, so that what lies on ``meta``, which holds no values, stands for another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import spikellm
from conftest import first_blocks
from families import GATED, randomized
from spikellm.models.placement import placed

META = torch.device("meta")


def test_what_was_taken_out_is_back_too() -> None:
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    weight, value = old.weight, old.weight.detach().clone()
    block = nn.Sequential(old)
    with placed(block, META):
        assert block[0].weight.is_meta
        block[0] = new
    assert old.weight is weight
    assert torch.equal(old.weight, value)
    assert not new.weight.is_meta


def test_nothing_happens_where_it_is_there_already() -> None:
    block = nn.Linear(3, 2)
    weight = block.weight
    with placed(block, torch.device("cpu")):
        block.weight.data.fill_(1.0)
    assert block.weight is weight
    assert bool((weight == 1.0).all())


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [  # a look at the whole model
            "activations.salient_rate=0.1",
            "activations.salient_steps=4",
            "activations.allocation=model",
        ],
    ],
    ids=["convert", "survey"],
)
def test_after_an_error_the_model_is_where_it_was(
    settings: list[str], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = first_blocks(1)
    check_unchanged_after_error(model, tokenizer, settings, text_file, monkeypatch)


def test_experts_too(tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.MixtralConfig(**GATED, num_local_experts=4)
    model = randomized(transformers.AutoModelForCausalLM.from_config(config))
    check_unchanged_after_error(model, tokenizer, [], text_file, monkeypatch)


def check_unchanged_after_error(
    model: Any,
    tokenizer: Any,
    settings: list[str],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = dict(model.named_parameters())
    tokens = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
    monkeypatch.setattr("spikellm.api.find_device", lambda _: META)
    options: dict[str, Any] = {"samples": 2, "seqlen": 32, "settings": settings}
    with pytest.raises(Exception, match="[mM]eta"):
        spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), device="meta", **options)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is one for name, one in before.items())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
