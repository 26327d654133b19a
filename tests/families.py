"""Small random models, one a family, with odd sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers as t

from budget import mostly_slow

COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = {
    **COMMON,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED: dict[str, Any] = {**SMALL, "intermediate_size": 52, "num_key_value_heads": 2}

FAMILIES: dict[str, Any] = {
    "llama": lambda: t.LlamaConfig(**GATED, head_dim=10),
    "qwen2": lambda: t.Qwen2Config(**GATED),
    "qwen3": lambda: t.Qwen3Config(**GATED, head_dim=12),
    "mistral": lambda: t.MistralConfig(**GATED, sliding_window=16),
    "gemma": lambda: t.GemmaConfig(**GATED, head_dim=12),
    "gemma3": lambda: t.Gemma3TextConfig(
        **{**GATED, "num_hidden_layers": 6}, head_dim=12, sliding_window=16
    ),
    "phi": lambda: t.PhiConfig(**{**GATED, "hidden_size": 64}),
    "phi3": lambda: t.Phi3Config(**GATED, original_max_position_embeddings=64),
    "gpt_neox": lambda: t.GPTNeoXConfig(**SMALL, intermediate_size=52),
    "opt": lambda: t.OPTConfig(**SMALL, ffn_dim=52, word_embed_proj_dim=40),
    "gpt2": lambda: t.GPT2Config(**COMMON, n_embd=40, n_layer=2, n_head=4, n_positions=64),
    "olmo2": lambda: t.Olmo2Config(**GATED),
    "stablelm": lambda: t.StableLmConfig(**GATED),
    "cohere": lambda: t.CohereConfig(**GATED),
    "gptj": lambda: t.GPTJConfig(
        **COMMON, n_embd=40, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
    ),
    "codegen": lambda: t.CodeGenConfig(
        **COMMON, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8
    ),
    "gpt_neo": lambda: t.GPTNeoConfig(
        **SMALL,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
    ),
    "openai_gpt": lambda: t.OpenAIGPTConfig(
        **COMMON, n_embd=40, n_layer=2, n_head=4, n_positions=64
    ),
    "olmo": lambda: t.OlmoConfig(**GATED),
    "bloom": lambda: t.BloomConfig(**COMMON, hidden_size=40, n_layer=2, n_head=4),
}
OWN_ATTENTION = {"bloom", "gptj", "codegen", "gpt_neo", "openai_gpt"}
"""Families that compute attention by themselves, not through the library's interface: their linear
layers spike alone.
"""


STRUCTURES = {"llama", "gpt2", "gpt_neox", "gemma2", "gemma3", "mixtral", "opt"}
"""Families of different structure, which are tested first: layers apart, transposed, fused; norms
behind; experts; biases and learned positions.
"""


def by_family(names: Iterable[str]) -> list[Any]:
    """Families as parameters of a test, slow unless they are of a structure of their own."""
    return mostly_slow(names, STRUCTURES)


def build(family: str, *, seed: int = 0) -> Any:
    """A random model whose weights are large enough that every layer matters."""
    torch.manual_seed(seed)
    return randomized(t.AutoModelForCausalLM.from_config(FAMILIES[family]()), seed=seed)


def randomized(model: Any, *, seed: int = 0) -> Any:
    """The model with large random weights."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3 / parameter.shape[-1] ** 0.25)
    return model.eval()
