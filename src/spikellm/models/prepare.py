"""Preparation of a model for conversion, undone if the conversion fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spikellm.models.attention_interface import CHILD, spiking_attentions, use_interface
from spikellm.models.experts import fuse_again, unfuse_experts
from spikellm.models.families import decoder_of, is_linear
from spikellm.models.swap import replace_module


@contextmanager
def evaluating(model: nn.Module, *, stays: bool = False) -> Iterator[None]:
    """Put a model into evaluation mode, without dropout.

    Afterwards every module has its former mode again; with ``stays`` only after an error.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    except BaseException:
        stays = False
        raise
    finally:
        if not stays:
            for module, training in modes.items():
                module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; afterwards each does as before."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextmanager
def prepared(model: Any, *, attention: bool) -> Iterator[None]:
    """Split experts and, where attention is to spike, compute it through the library's interface;
    after an error undo both, and the conversion.

    Raises:
        UnsupportedModelError: see :func:`spikellm.models.attention_interface.use_interface`.
    """
    experts_before = getattr(model.config, "_experts_implementation", None)
    decoder = decoder_of(model)
    attention_before = str(decoder.config._attn_implementation)
    experts = unfuse_experts(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    tables = {
        name: (module, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    tied = getattr(model.config, "tie_word_embeddings", None)
    vectors = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1
    }
    try:
        if attention:
            use_interface(model)
        yield
    except BaseException:
        for name, module in linears.items():  # converted, or with transforms fused into them
            if model.get_submodule(name) is not module:
                replace_module(model, name, module)
        for name, (table, weight) in tables.items():
            table.weight = weight
            if model.get_submodule(name) is not table:
                replace_module(model, name, table)
        if tied is not None:
            model.config.tie_word_embeddings = tied
        for name, value in vectors.items():  # scales may have been fused into norms
            model.get_parameter(name).data.copy_(value)
        for name in spiking_attentions(model):
            delattr(model.get_submodule(name), CHILD)
        if attention and decoder._can_set_attn_implementation():
            decoder.set_attn_implementation(attention_before)
        fuse_again(model, experts, experts_before)
        raise
