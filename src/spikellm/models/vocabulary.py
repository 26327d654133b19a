"""Input embedding and output projection as coded tables: which a model has, and their swap."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core.errors import RequestError, UnsupportedModelError
from spikellm.models.families import has_tied_head, is_linear, weight_and_bias
from spikellm.models.plan import output_head
from spikellm.models.swap import replace_module
from spikellm.nn.vocabulary import CodedEmbedding, CodedHead, CodedTable
from spikellm.recipe import VocabularyRecipe

_PROBED = 8  # rows that are looked up to see what an embedding does with them


class CodedVocabulary(NamedTuple):
    """Full names of the embedding and the output projection, None of one that stays; whether both
    have one table.
    """

    embedding: str | None
    head: str | None
    shared: bool

    @property
    def modules(self) -> list[str]:
        """Names of those that are coded."""
        return [name for name in (self.embedding, self.head) if name is not None]


def plan_vocabulary(
    model: Any, settings: VocabularyRecipe, *, untied: bool = False
) -> CodedVocabulary:
    """What of a model's vocabulary is to be coded.

    Args:
        untied: the projection will have a table of its own when it is coded.

    Raises:
        RequestError: one is asked for whose table both share, or the model has no such.
        UnsupportedModelError: it is of an unknown kind.
    """
    shared = has_tied_head(model) and not untied
    if shared and len(settings.layers) == 1:
        raise RequestError(
            f"vocabulary.layers is {list(settings.layers)}, and {type(model).__name__} has one"
            " table for embedding and head; leave vocabulary.layers out"
        )
    names: dict[str, str | None] = {"embedding": None, "head": None}
    for layer in settings.layers:
        name = input_embedding(model) if layer == "embedding" else output_head(model)
        if name is None:
            raise RequestError(
                f"vocabulary.layers asks for the {layer}, and {type(model).__name__} has none"
            )
        names[layer] = name
    if names["embedding"] is not None:
        _multiplier(model.get_submodule(names["embedding"]))
    if names["head"] is not None and not is_linear(model.get_submodule(names["head"])):
        raise UnsupportedModelError(
            f"the output projection of {type(model).__name__} is a"
            f" {type(model.get_submodule(names['head'])).__name__}, expected a linear layer; leave"
            " vocabulary out"
        )
    return CodedVocabulary(names["embedding"], names["head"], shared)


def input_embedding(model: Any) -> str | None:
    """Full name of the input embedding."""
    embedding = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is embedding), None)


def _multiplier(embedding: nn.Module) -> Tensor:
    """What an embedding takes its rows times, ``(1,)`` in their type: one of its own numbers.

    Raises:
        UnsupportedModelError: it does something else with them.
    """
    if isinstance(embedding, nn.Embedding) and embedding.max_norm is None:
        weight = embedding.weight.detach()
        rows = torch.arange(min(_PROBED, len(weight)), device=weight.device)
        with torch.no_grad():
            given = embedding(rows)
        numbers = [value for value in vars(embedding).values() if isinstance(value, float)]
        numbers += [float(one) for one in embedding.buffers() if one.numel() == 1]
        for number in (1.0, *numbers):
            found = torch.full((1,), number, dtype=weight.dtype, device=weight.device)
            if torch.equal(given, weight[rows] * found):
                return found
    raise UnsupportedModelError(
        f"the embedding, a {type(embedding).__name__}, gives something else than its rows, or those"
        " times one number; leave vocabulary out, or set vocabulary.layers to [head]"
    )


def coded_vocabulary(
    model: nn.Module, sites: CodedVocabulary, tables: dict[str, CodedTable]
) -> dict[str, nn.Module]:
    """The modules that take the places of a model's own, by name.

    Args:
        tables: by name of the module; one that both share under that of the embedding.
    """
    modules: dict[str, nn.Module] = {}
    if sites.embedding is not None:
        own = model.get_submodule(sites.embedding)
        modules[sites.embedding] = CodedEmbedding(tables[sites.embedding], _multiplier(own))
    if sites.head is not None:
        table = tables[str(sites.embedding) if sites.shared else sites.head]
        _, bias = weight_and_bias(model.get_submodule(sites.head))
        own_bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        modules[sites.head] = CodedHead(table, own_bias, shared=sites.shared)
    return modules


def empty_vocabulary(
    model: nn.Module, sites: CodedVocabulary, settings: VocabularyRecipe
) -> dict[str, nn.Module]:
    """The same for a model without its weights, on the device that these have."""
    modules: dict[str, nn.Module] = {}
    table: CodedTable | None = None
    if sites.embedding is not None:
        weight = model.get_submodule(sites.embedding).weight
        assert isinstance(weight, Tensor)
        table = CodedTable.like(weight, settings)
        modules[sites.embedding] = CodedEmbedding(table, weight.new_ones(1))
    if sites.head is not None:
        weight, bias = weight_and_bias(model.get_submodule(sites.head))
        if table is None or not sites.shared:
            table = CodedTable.like(weight, settings)
        own_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        modules[sites.head] = CodedHead(table, own_bias, shared=sites.shared)
    return modules


def put_vocabulary(model: Any, modules: dict[str, nn.Module]) -> None:
    """Put coded modules into a model, which forgets that their weights were tied."""
    for name, module in modules.items():
        replace_module(model, name, module)
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, attribute, None)
        if isinstance(tied, dict):
            left = {
                one: other
                for one, other in tied.items()
                if not {one.rpartition(".")[0], other.rpartition(".")[0]} & modules.keys()
            }
            setattr(model, attribute, left)
