"""Where the decoder blocks of a model are, and which of their layers are linear.

Blocks are found by structure: by ``_no_split_modules`` of the model library, or else as the largest
``ModuleList`` of one class. Names of families appear in this file only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core.errors import UnsupportedModelError
from spikellm.models.experts import routers_of
from spikellm.nn.rotation import LINEAR, Rotated


class Blocks(NamedTuple):
    """Decoder blocks of a model: the full name of the list that holds them, and the blocks."""

    name: str
    modules: nn.ModuleList


def find_blocks(model: nn.Module) -> Blocks:
    """The list of decoder blocks of a causal language model.

    Raises:
        UnsupportedModelError: an encoder-decoder, or no list of equal blocks.
    """
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder; only decoder-only causal language models can be"
            " converted"
        )
    within = _text_model(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and f"{name}.".startswith(within)
    ]
    whole = set(getattr(model, "_no_split_modules", None) or ())
    declared = [entry for entry in lists if _class_names(entry[1]) <= whole]
    uniform = [entry for entry in lists if len(_class_names(entry[1])) == 1]
    candidates = declared or uniform
    if not candidates:
        raise UnsupportedModelError(
            f"{kind} has no list of equal decoder blocks; only decoder-only causal language models"
            " built of such blocks can be converted"
        )
    name, modules = max(
        candidates, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters())
    )
    return Blocks(name, modules)


def _text_model(model: nn.Module) -> str:
    """Prefix of the text model within a model that has towers for pictures or sound beside it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def decoder_of(model: nn.Module) -> Any:
    """The module that runs the decoder blocks: what makes their mask and their cache.

    It has the configuration of the text model, also where that is wrapped in another.
    """
    owner, _, _ = find_blocks(model).name.rpartition(".")
    while owner and not hasattr(model.get_submodule(owner), "config"):
        owner = owner.rpartition(".")[0]
    return model.get_submodule(owner)


def _class_names(blocks: nn.ModuleList) -> set[str]:
    return {type(block).__name__ for block in blocks}


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of a block by name within it: ``nn.Linear``, and ``Conv1D`` as GPT-2 has it.

    Routers of mixture-of-experts layers are left out; fused experts must have been split
    (:mod:`spikellm.models.experts`).

    Raises:
        UnsupportedModelError: the block has matrices outside of such layers, which would stay dense
            without notice.
    """
    routers = routers_of(block)

    def routes(name: str) -> bool:
        return any(name == router or name.startswith(f"{router}.") for router in routers)

    found = {
        name: module
        for name, module in block.named_modules()
        if is_linear(module) and not routes(name)
    }
    owners = {
        name: block.get_submodule(name.rpartition(".")[0])
        for name, parameter in block.named_parameters()
        if parameter.dim() > 1
    }
    dense = [
        name
        for name, owner in owners.items()
        if not (is_linear(owner) or routes(name) or isinstance(owner, (nn.Conv1d, nn.Embedding)))
    ]
    if dense:
        largest = max(dense, key=lambda name: block.get_parameter(name).numel())
        raise UnsupportedModelError(
            f"{type(block).__name__} has the matrix {largest} in a"
            f" {type(owners[largest]).__name__}, which is no layer of a known kind (nn.Linear,"
            " Conv1D), so it would stay dense; this family cannot be converted"
        )
    if not found:
        raise UnsupportedModelError(
            f"{type(block).__name__} has no linear layer of a known kind (nn.Linear, Conv1D)"
        )
    return found


def caches_latents(attention: nn.Module) -> bool:
    """Whether an attention module caches compressed latents and computes K and V from them
    (multi-head latent attention).
    """
    return hasattr(attention, "kv_b_proj")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a known kind."""
    return type(module) is nn.Linear or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as ``(out, in)`` and bias of a linear layer of any known kind."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = module.bias if isinstance(module.bias, Tensor) else None
    return (weight.T if _is_transposed(module) else weight), bias


def has_tied_head(model: nn.Module) -> bool:
    """Whether the output projection shares its weight with the input embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and getattr(head, "weight", None) is getattr(
        embedding, "weight", torch.empty(0)
    )


def longest_window(config: object) -> int | None:
    """Tokens that a model can attend to, as its configuration says; None where it says nothing."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


# Names of the parts of a decoder block, as families call them. What a name promises is checked
# numerically before it is relied on.
_ROLES: dict[str, tuple[str, ...]] = {
    "attention_norm": ("input_layernorm", "ln_1", "self_attn_layer_norm"),
    "feedforward_norm": (
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "ln_2",
        "final_layer_norm",
    ),
    "query": ("self_attn.q_proj",),
    "key": ("self_attn.k_proj",),
    "value": ("self_attn.v_proj",),
    "fused": ("self_attn.qkv_proj", "attention.query_key_value", "attn.c_attn"),
    "output": (
        "self_attn.o_proj",
        "self_attn.out_proj",
        "self_attn.dense",
        "attention.dense",
        "attn.c_proj",
    ),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj", "mlp.fc1", "mlp.c_fc", "fc1", "mlp.gate_up_proj", "mlp.dense_h_to_4h"),
    "down": ("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "fc2", "mlp.dense_4h_to_h"),
}


INPUT_SITES: dict[str, tuple[str, ...]] = {
    "attention-input": ("query", "key", "value", "fused"),
    "feedforward-input": ("gate", "up"),
    "output": ("output",),
    "down": ("down",),
}
"""Tensors that layers of a block read, and the roles of the layers that read each."""


def site_layers(roles: Mapping[str, str], site: str) -> list[str]:
    """Names, within a block, of the layers that read a site; none where the family has no such."""
    return [roles[role] for role in INPUT_SITES[site] if role in roles]


def block_roles(block: nn.Module) -> dict[str, str]:
    """Names, within a block, of the layers that equivalent transforms change, by role.

    Roles that the family lacks are left out.
    """
    names = dict(block.named_modules())
    inner = {
        name: f"{name}.{LINEAR}" if isinstance(module, Rotated) else name
        for name, module in names.items()
    }
    found = {}
    for role, candidates in _ROLES.items():
        for name in candidates:
            if name in names:
                found[role] = inner[name]
                break
    return found


# Names of further parts that a native decoder step looks for; what they do is compared with the
# library before it is relied on.
_PARTS: dict[str, tuple[str, ...]] = {
    "attention_post_norm": ("post_attention_layernorm",),
    "feedforward_post_norm": ("post_feedforward_layernorm",),
    "query_norm": ("self_attn.q_norm",),
    "key_norm": ("self_attn.k_norm",),
    "activation": ("mlp.act_fn", "mlp.activation_fn", "mlp.act", "activation_fn"),
    "attention": ("self_attn", "attention", "attn"),
}
_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


def block_parts(block: nn.Module) -> dict[str, nn.Module]:
    """Parts of a block beside its linear layers, by role; those that it lacks are left out. Two
    norms behind one another are told apart by the norm before the feed-forward part.
    """
    names, found = dict(block.named_modules()), {}
    for role, candidates in _PARTS.items():
        name = next((name for name in candidates if name in names), None)
        if name is not None:
            found[role] = names[name]
    roles = block_roles(block)
    for role in ("attention_norm", "feedforward_norm"):
        if role in roles:
            found[role] = names[roles[role]]
    if found.get("attention_post_norm") is found.get("feedforward_norm"):
        found.pop("attention_post_norm", None)
    return found


def final_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm behind the last block of a decoder."""
    return next((getattr(decoder, name) for name in _FINAL_NORMS if hasattr(decoder, name)), None)


class GgufFamily(NamedTuple):
    """How llama.cpp reads a family whose tensors have one counterpart each.

    Attributes:
        architecture: its name there.
        pairs_adjacent: channels that are rotated together are neighbours there.
        frequency_factors: it reads factors of rotary frequencies.
    """

    architecture: str
    pairs_adjacent: bool = False
    frequency_factors: bool = False


_INTERLEAVED = GgufFamily("llama", pairs_adjacent=True, frequency_factors=True)
GGUF_FAMILIES = {
    "llama": _INTERLEAVED,
    "mistral": _INTERLEAVED,
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
}
"""By ``model_type`` of the model library's configuration."""
GGUF_BYTE_PAIRS = "gpt2"
"""llama.cpp's name for tokenizers of byte pairs."""
GGUF_DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}
"""Its names for ways to split text that differ in how many digits stay together, as a quantifier of
a regular expression.
"""
GGUF_WHOLE_WORDS = frozenset({"llama-bpe"})
"""Those where it looks up whole words before it merges pairs."""
