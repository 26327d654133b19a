"""Text models that are wrapped in others, or parted from them: one of each kind that the library's
automatic class gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import spikellm
from budget import mostly_slow
from families import GATED, randomized
from spikellm.models.families import find_blocks

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {**GATED, "head_dim": 12}
CONFIGS: dict[str, Any] = {
    "vision tower beside the text model": lambda: transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION
    ),
    "wrapper whose attention cannot be set": lambda: transformers.GotOcr2Config(
        text_config=GATED, vision_config=VISION
    ),
    "text model parted from its wrapper": lambda: transformers.MllamaConfig(
        text_config={**GATED, "cross_attention_layers": []}, vision_config=VISION
    ),
    "embeddings of patches": lambda: transformers.FuyuConfig(
        text_config={**GATED, "hidden_size": 64, "num_key_value_heads": 4}
    ),
    "parts in the text model": lambda: transformers.Emu3Config(text_config=GATED),
}
EIGHT = "{bits: 8}"
ATTENTION = [f"attention={{query: {EIGHT}, key: {EIGHT}, value: {EIGHT}}}"]


@pytest.mark.parametrize("kind", mostly_slow(CONFIGS, list(CONFIGS)[:1]))
def test_wrapped_text_models_spike_generate_and_reload(
    kind: str, tokenizer: Any, text_file: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = randomized(transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()))
    tower = getattr(getattr(model, "model", None), "vision_tower", None)
    before = None if tower is None else tower.config._attn_implementation
    spikellm.convert(
        model, tokenizer, "w8a8", str(text_file), samples=2, seqlen=24, settings=ATTENTION
    )
    assert "vision" not in find_blocks(model).name
    if tower is not None:
        assert tower.config._attn_implementation == before, "only the text model spikes"
    spikellm.save(model, tokenizer, tmp_path / "out")
    again, _ = spikellm.load(tmp_path / "out")
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(again(tokens).logits, logits)
        model.set_attn_implementation("spike")  # of all parts: changes nothing
        assert torch.equal(model(tokens).logits, logits)
        texts = [one.generate(tokens, max_new_tokens=3, do_sample=False) for one in (model, again)]
    assert torch.equal(*texts)
    assert spikellm.perplexity(again, tokenizer, str(text_file), seqlen=24, limit=2).value > 1


def test_the_blocks_of_the_text_model_are_taken_where_another_tower_is_larger() -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma3Config(
            text_config=TEXT, vision_config={**VISION, "hidden_size": 128, "num_hidden_layers": 8}
        )
    )
    assert find_blocks(model).name == "model.language_model.layers"
