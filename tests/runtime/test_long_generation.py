"""Two hundred tokens of ten prompts: the native step says what the library's pass says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spikellm
from conftest import SHARED, needs_shared
from native import needs_compiler
from spikellm.runtime.decoder_step.summary import NATIVE, step_in_words

MODELS = ("llama-wt2-8m", "llama-wt2-8m-outliers", "stories-260k")
PROMPTS, NEW, EACH = 10, 200, 7
TEXT = SHARED / "text" / "wikitext-2"


def prompts(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Of unequal lengths, padded on the left."""
    text = (TEXT / "test.txt").read_text(encoding="utf-8")[:8000]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    longest = EACH + 3 * PROMPTS
    rows = torch.stack([tokens[50 * row : 50 * row + longest] for row in range(PROMPTS)])
    mask = torch.ones_like(rows)
    for row in range(PROMPTS):
        mask[row, : 3 * row] = 0
    return rows, mask


def said(model: Any, rows: Tensor, mask: Tensor) -> Tensor:
    found: Tensor = model.generate(
        rows, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return found[:, rows.shape[1] :]


@needs_shared
@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", [pytest.param(False, marks=pytest.mark.long), True])
def test_ten_prompts(name: str, attention: bool) -> None:
    model, tokenizer = spikellm.load(SHARED / "models" / name)
    settings = ["attention.query.bits=4", "attention.key.bits=4", "attention.value.bits=4"]
    spikellm.convert(
        model,
        tokenizer,
        "w4a4-t2",
        str(TEXT / "train.txt"),
        samples=2,
        seqlen=64,
        settings=settings if attention else [],
    )
    rows, mask = prompts(tokenizer)
    step = said(model, rows, mask)
    assert step_in_words(model) == NATIVE, step_in_words(model)
    own = model.__dict__.pop("forward")
    try:
        passes = said(model, rows, mask)
    finally:
        model.forward = own
    assert torch.equal(step, passes)
    assert len({tuple(row.tolist()) for row in step}) == PROMPTS, "each says something of its own"
