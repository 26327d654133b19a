"""Numbers that go wrong elsewhere: overflow, silent channels, constant text, rows of padding alone.

And the same bytes with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spikellm
from budget import mostly_slow
from conftest import first_blocks
from spikellm.core.errors import NumericalError, RequestError

RECIPES = {
    "w4a4-t2": (),
    "gptq-w4a16": (),
    "spike-w4a4-t2": ("algorithm.epochs=1",),
    "ternary-1.4-a4-t2": ("weights.allocation=layer", "algorithm.rounds=1"),
    "pbllm-90": (),
    "bcq-2": ("algorithm.rounds=1", "algorithm.descents=1"),
    "billm": (),
}


def converted(
    recipe: str,
    text: str | Path,
    change: Callable[[Any], object] = lambda _: None,
    *,
    seqlen: int = 32,
) -> Any:
    model, tokenizer = first_blocks()
    change(model)
    spikellm.convert(
        model, tokenizer, recipe, str(text), samples=2, seqlen=seqlen, settings=RECIPES[recipe]
    )
    return model


def silence(model: Any) -> None:
    """Channels that are always zero in front of q, k, v, gate and up, behind up and in v."""
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[3:9] = 0
        layer.mlp.up_proj.weight.data[5:20] = 0
        layer.self_attn.v_proj.weight.data[7] = 0


def overflow(model: Any) -> None:
    model.to(torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data *= 3e4


@pytest.mark.parametrize("recipe", RECIPES)
def test_silent_channels(recipe: str, text_file: Path, tokens: torch.Tensor) -> None:
    model = converted(recipe, text_file, silence)
    with torch.no_grad():
        assert torch.isfinite(model(tokens, use_cache=False).logits).all()
    assert all(
        record["relative_loss"] < 0.3
        for record in model.config.quantization_config.record["blocks"]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_constant_text(recipe: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the " * 5000)
    with torch.no_grad():
        assert torch.isfinite(
            converted(recipe, tmp_path / "text.txt")(tokens, use_cache=False).logits
        ).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_overflow_names_the_block(recipe: str, text_file: Path) -> None:
    with pytest.raises(NumericalError, match=r"behind block model\.layers\.1; .*float16"):
        converted(recipe, text_file, overflow)


def test_windows_of_one_token_are_refused(text_file: Path) -> None:
    with pytest.raises(RequestError, match="at least 2 tokens"):
        converted("w4a4-t2", text_file, seqlen=1)


def test_a_row_of_padding_alone_disturbs_no_other(text_file: Path, tokens: torch.Tensor) -> None:
    model = converted("spike-w4a4-t2", text_file)
    batch, mask = (
        torch.cat([tokens[:1], torch.zeros_like(tokens[:1])]),
        torch.ones(2, tokens.shape[1], dtype=torch.long),
    )
    mask[1] = 0
    alone = model.generate(tokens[:1], attention_mask=mask[:1], max_new_tokens=6, do_sample=False)
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("recipe", mostly_slow(RECIPES, {"w4a4-t2", "spike-w4a4-t2"}))
def test_threads_change_no_byte(recipe: str, text_file: Path) -> None:
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            states.append(converted(recipe, text_file).state_dict())
    finally:
        torch.set_num_threads(before)
    assert states[0].keys() == states[1].keys()
    differing = [
        name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])
    ]
    assert not differing
