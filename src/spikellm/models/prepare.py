"""A model made ready for conversion, and put back as it was if that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spikellm.models.attention_interface import CHILD, spiking_attentions, use_interface
from spikellm.models.experts import fuse_again, unfuse_experts
from spikellm.models.families import is_linear
from spikellm.models.swap import replace_module


@contextmanager
def evaluating(model: nn.Module, *, stays: bool = False) -> Iterator[None]:
    """A model in evaluation mode: nothing is dropped out.

    Afterwards every module is in the mode it was in; with ``stays`` only after an error.
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
def prepared(model: Any, *, attention: bool) -> Iterator[None]:
    """Take experts apart and, where attention is to spike, compute it through the library's
    interface; after an error undo that and all that was converted.

    Raises:
        UnsupportedModelError: see :func:`spikellm.models.attention_interface.use_interface`.
    """
    experts_before = getattr(model.config, "_experts_implementation", None)
    attention_before = str(model.config._attn_implementation)
    experts = unfuse_experts(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    tables = {
        module: module.weight for module in model.modules() if isinstance(module, nn.Embedding)
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
        for table, weight in tables.items():
            table.weight = weight
        if tied is not None:
            model.config.tie_word_embeddings = tied
        for name, value in vectors.items():  # norms may have taken over scales
            model.get_parameter(name).data.copy_(value)
        for name in spiking_attentions(model):
            delattr(model.get_submodule(name), CHILD)
        if attention and model._can_set_attn_implementation():
            model.set_attn_implementation(attention_before)
        fuse_again(model, experts, experts_before)
        raise
